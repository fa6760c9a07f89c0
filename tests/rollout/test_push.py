"""Weights: pushed, proved, and never stale."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from align.errors import ConfigError, RolloutError
from align.rollout import SamplingParams, make_engine
from align.rollout.adapters import ArrivedShare, adapter_weights, inner
from align.rollout.probe import Probe, check_probe
from tests.rollout.rollout_models import EOS, is_greedy, llama, needs_vllm, never_ending, prompts

GREEDY = SamplingParams(max_tokens=16, temperature=0)


def greedy(engine, ids) -> list[list[int]]:
    return [r.completions[0].token_ids for r in engine.generate(ids, GREEDY)]


def follows(model, ids, completions) -> bool:
    assert all(len(completion) == GREEDY.max_tokens for completion in completions)
    return all(is_greedy(model, p, completion) for p, completion in zip(ids, completions, strict=True))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_push_changes_what_is_generated_and_matches_the_model(holding, tied):
    ids = prompts([4, 30, 140])
    first, second = (never_ending(llama(seed, tie_word_embeddings=tied)) for seed in (0, 1))
    engine = holding(first)
    before = greedy(engine, ids)
    assert follows(first, ids, before)
    for version, model in enumerate([second, first, second], start=1):
        report = engine.push(model, version)
        assert report.weight_version == engine.weight_version == version
        assert report.proved_tensors == len(dict(model.named_parameters())) and report.probe is None
        assert follows(model, ids, greedy(engine, ids))
    assert greedy(engine, ids) != before
    assert engine.generate(ids, GREEDY)[0].weight_version == 3


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_one_missed_step_of_one_tensor_is_found(holding, monkeypatch, tied, dtype):
    """The trainer's float32 weights move by 1e-6 of their size, in one tensor; the engine may round to bfloat16."""
    model = llama(tie_word_embeddings=tied, hidden_size=128, vocab_size=512)
    engine = holding(model, dtype=dtype)
    engine.verify(model)
    for name in (
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.0.self_attn.k_proj.weight",
        "model.embed_tokens.weight",
    ):
        before = model.get_parameter(name).to(dtype, copy=True)
        with torch.no_grad():
            model.get_parameter(name).mul_(1 + 1e-6)
        assert (
            0
            < (model.get_parameter(name).to(dtype) != before).float().mean()
            < (1.1 if dtype == torch.float32 else 1e-2)
        )
        with pytest.raises(RolloutError, match=f"version 0.*: of .* tensors 1 differ .{name}.*missed"):
            engine.verify(model)
        monkeypatch.setattr(engine, "_load", lambda weights: None)  # a push that does not arrive
        with pytest.raises(RolloutError, match=f"1 differ .{name}"):
            engine.push(model, 0)
        monkeypatch.undo()
        assert engine.push(model, 0).proved_tensors == len(dict(model.named_parameters()))


def test_a_push_that_arrives_in_part_is_found(holding, monkeypatch):
    first, second = llama(0), llama(1)
    engine = holding(first)
    load = engine._load
    monkeypatch.setattr(engine, "_load", lambda weights: load(pair for pair in weights if "q_proj" not in pair[0]))
    with pytest.raises(RolloutError, match="q_proj"):
        engine.push(second, 1)


@needs_vllm
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_vllms_fused_sliced_and_packed_weights_are_each_proved(dtype):
    """Grouped heads, biases on some, a vocabulary that vLLM pads (96 -> 128), tied embeddings with a packed copy."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"vocab_size": 100, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, **heads))
    engine = make_engine(model, backend="vllm", max_model_len=64, dtype=dtype)
    placement = engine._placement
    # Without kernels for bfloat16 (oneDNN has none for older CPUs) the layers keep their weights.
    assert placement.direct and (len(placement.packed), len(placement.repacked)) in ((8, 1), (0, 9))
    assert placement.packed or dtype == torch.bfloat16
    for name, _ in list(model.named_parameters()):
        last = model.get_parameter(name).data.view(-1)[-1:]
        kept = last.clone()
        last.add_(0.5)
        with pytest.raises(RolloutError, match=f"1 differ .{name}"):
            engine.verify(model)
        last.copy_(kept)
    engine.push(model, 1)
    attention = engine._llm.apply_model(lambda inner: inner.model.layers[0].self_attn)[0]
    stale = attention.qkv_proj.cpu_linear
    engine.push(model, 2)
    attention.qkv_proj.cpu_linear = stale  # another packed copy than the one that was fingerprinted
    with pytest.raises(RolloutError, match="3 differ|is not that of the last push"):
        engine.verify(model)
    engine.close()


@needs_vllm
def test_a_wrong_packing_is_found(monkeypatch):
    from align.rollout import vllm_weights

    model = llama(tie_word_embeddings=True)
    engine = make_engine(model, backend="vllm", max_model_len=64)
    right = vllm_weights.dispatch_cpu_unquantized_gemm
    monkeypatch.setattr(vllm_weights, "dispatch_cpu_unquantized_gemm", lambda module, remove_weight: None)
    with pytest.raises(RolloutError, match="packed"):
        for version in range(1, vllm_weights.CHECKED_SHARE + 1):  # in turns; the first that is multiplied shows it
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.01)
            engine.push(model, version)
    monkeypatch.setattr(vllm_weights, "dispatch_cpu_unquantized_gemm", right)
    engine.close()


@needs_vllm
def test_an_engine_that_answers_from_old_keys_and_values_is_found(monkeypatch):
    engine = make_engine(llama(0), backend="vllm", max_model_len=256)
    monkeypatch.setattr(engine._llm, "reset_prefix_cache", lambda: True)
    engine.probe(llama(0))
    engine.push(llama(1), 1)
    with pytest.raises(RolloutError, match="does not compute what the trainer computes"):
        engine.probe(llama(1))
    engine.close()


@pytest.mark.parametrize(("engine", "advised"), [("vllm", True), ("server", True), ("transformers", False)])
def test_the_probe_does_not_advise_the_engine_that_it_refuses(engine, advised):
    with pytest.raises(RolloutError) as found:
        check_probe(Probe(1.0, 1.0, 1.0, 1.0, 1e-6, 8), engine, 0, None)
    assert ("rollout.backend: transformers" in str(found.value)) == advised


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_probe_takes_rounding_and_no_other_temperature(holding, monkeypatch, dtype):
    model = llama(scale=0.05)
    engine = holding(model, dtype=dtype)
    probe = engine.probe(model)
    assert probe.mean_abs_diff < 16 * probe.rounding and probe.mean_abs_diff <= probe.p90_abs_diff <= probe.max_abs_diff
    assert (1e-8 < probe.rounding < 1e-5) if dtype == torch.float32 else (1e-4 < probe.rounding < 0.05)
    complete = engine._complete

    def at_another_temperature(requests, progress):
        return complete([replace(r, params=replace(r.params, temperature=0.8)) for r in requests], progress)

    monkeypatch.setattr(engine, "_complete", at_another_temperature)
    with pytest.raises(RolloutError, match="does not compute what the trainer computes"):
        engine.probe(model)


def test_the_engine_keeps_its_weights_while_the_trainers_change(holding):
    model = never_ending(llama())
    engine, ids = holding(model), prompts([4, 20])
    before = greedy(engine, ids)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-1.5)
    assert greedy(engine, ids) == before


def test_a_prompt_longer_than_a_block_is_not_answered_from_the_old_cache(holding):
    ids = prompts([200, 200, 230])
    first, second = never_ending(llama(0)), never_ending(llama(1))
    engine = holding(first)
    greedy(engine, ids)  # fills the prefix cache
    engine.push(second, 1)
    assert follows(second, ids, greedy(engine, ids))


def lora(model, **options):
    with torch.random.fork_rng():
        torch.manual_seed(5)
        defaults = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "lora_dropout": 0.2}
        model = get_peft_model(model, LoraConfig(**{**defaults, **options}))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.2)
    return model.train()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dora": True},
        {"use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens", "v_proj", "lm_head"]},
    ],
    ids=["lora", "dora", "rslora", "modules_to_save", "embeddings"],
)
def test_adapters_are_merged_without_touching_the_model(holding, options):
    base = never_ending(llama())
    engine, ids = holding(base), prompts([4, 30])
    without = greedy(engine, ids)
    model = lora(base, **options)
    if "modules_to_save" in options:
        with torch.no_grad():
            model.base_model.model.lm_head.modules_to_save["default"].weight.normal_(std=0.1)
    held = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    engine.push(model, 1)
    assert engine.probe(model).max_abs_diff < 5e-4  # merged weights round in another way; missed ones differ by over 1
    after = greedy(engine, ids)
    assert follows(model, ids, after) and not follows(model, ids, without)
    assert held.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, held[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_share_of_an_adapter_that_arrives(dtype):
    """All of it without rounding, nearly all in bfloat16, and none is told before it has changed anything."""
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules="all-linear"))  # its B is 0 at first
    before, after = ArrivedShare(), ArrivedShare()
    assert len(dict(adapter_weights(model, dtype, before))) == 2 * 14 and before.share is None
    dict(adapter_weights(lora(llama()), dtype, after))
    assert after.share == 1 if dtype == torch.float32 else after.share == pytest.approx(1, abs=1e-3)


def test_an_engine_starts_from_an_adapter_model_with_a_tied_base(make):
    model = lora(never_ending(llama(tie_word_embeddings=True)))
    engine, ids = make(model), prompts([4, 30])
    assert follows(model, ids, greedy(engine, ids))


def test_pushing_bfloat16_adapters_often_leaves_the_base_as_it_was(holding):
    model = lora(never_ending(llama(scale=0.02, dtype=torch.bfloat16)))
    base = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    held = base.detach().clone()
    engine = holding(model)
    for version in range(1, 6):
        engine.push(model, version)
    assert torch.equal(base, held)


def test_an_adapter_on_tied_embeddings_is_refused(make):
    model = lora(llama(tie_word_embeddings=True), target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(ConfigError, match="ties its input and output embeddings"):
        make(model)


def test_the_probe_leaves_the_trainer_and_the_draws_alone(holding):
    model = never_ending(llama())
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    params, ids = SamplingParams(8), prompts([4, 9])
    engine = holding(model, seed=3)
    expected = [engine.generate(ids, params) for _ in range(2)]
    engine = holding(model, seed=3)
    got = [engine.generate(ids, params)]
    engine.verify(model)
    engine.push(model, 0)
    got.append(engine.generate(ids, params))
    assert got == expected
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.fixture
def fresh_accelerator_state():
    """accelerate keeps one precision per process; trainers of other tests may have set theirs."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


def test_the_probe_takes_accelerates_mixed_precision_as_it_is(holding, fresh_accelerator_state):
    from accelerate import Accelerator

    model = llama()
    prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model)
    assert "forward" in vars(prepared)
    for dtype in (torch.bfloat16, torch.float32):  # of the engine; the trainer computes in bfloat16
        probe = holding(prepared, dtype=dtype).verify(prepared)
        assert probe.rounding > 1e-3
    assert "forward" in vars(prepared)


def test_pushing_a_model_with_other_end_tokens_does_not_change_the_engines(make):
    engine = make(llama())
    assert engine.eos_token_ids == (EOS,)
    engine.push(never_ending(llama(1)), 1)
    assert engine.eos_token_ids == (EOS,)


def test_the_inner_product_of_two_updates_is_that_of_their_products():
    draw = torch.Generator().manual_seed(0)
    a, other_a = (torch.randn(2, 5, generator=draw, dtype=torch.float64) for _ in range(2))
    b, other_b = (torch.randn(4, 2, generator=draw, dtype=torch.float64) for _ in range(2))
    assert inner(a, b, other_a, other_b) == pytest.approx(((b @ a) * (other_b @ other_a)).sum().item())
