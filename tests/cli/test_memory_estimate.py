"""The memory estimate against what a tiny model really takes."""

import gc
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    GPT2Config,
    LlamaConfig,
    Qwen2Config,
)

from align.cli.estimate import GIB, Estimate, Packed, estimate, members_shape, model_shape, optimizer_bytes
from align.modeling.load import load_policy, load_sequence_classifier
from align.modeling.member_lora import add_member_adapters
from align.modeling.members import share_trunk
from align.trainers.on_policy.critic import make_critic
from align.trainers.ppo import PPOConfig

LORA = LoraConfig(r=4, target_modules="all-linear")
ROWS, LENGTH = 4, 64
ACTIVATIONS_WITHIN = 1.3  # the rough part: estimated and measured bytes differ by at most this factor


def config(**changes):
    sizes = {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 344,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
    }
    return Qwen2Config(**{**sizes, **changes})


def part(result: Estimate, name: str) -> int:
    (found,) = [part.bytes for part in result.parts if part.name.startswith(name)]
    return found


def estimated(shape, **changes):
    defaults = {
        "optim": "adamw_torch",
        "mixed": False,
        "checkpointing": False,
        "tokens": ROWS * LENGTH,
        "logits": True,
    }
    return estimate(shape, **{**defaults, **changes})


def train_one_step(model):
    """One AdamW step; the bytes of weights, gradients, optimiser states, and kept for the backward pass."""
    kept = {}

    def keep(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable)
    ids = torch.randint(0, 512, (ROWS, LENGTH))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model(input_ids=ids, output_hidden_states=True, logits_to_keep=1).hidden_states[-1]
    hidden.square().mean().backward()
    optimizer.step()
    states = sum(v.nbytes for state in optimizer.state.values() for v in state.values() if v.dim() > 0)
    return {
        "weights": sum(p.nbytes for p in model.parameters()),
        "gradients": sum(p.grad.nbytes for p in trainable if p.grad is not None),
        "optimiser states": states,
        "kept": sum(kept.values()),
    }


@pytest.mark.parametrize("lora", [False, True])
def test_weights_gradients_and_optimiser_states_are_exact(lora):
    peft_config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
    shape = model_shape(config(), dtype="float32", peft_config=peft_config)
    model = AutoModelForCausalLM.from_config(config())
    model = get_peft_model(model, peft_config) if lora else model
    measured = train_one_step(model)
    result = estimated(shape)
    for name in ("weights", "gradients", "optimiser states"):
        assert part(result, name) == measured[name], name


@pytest.mark.parametrize(
    ("hold", "options"),
    [
        (lambda model, lora: add_member_adapters(model, lora, [1, 2, 3]), {"peft_config": LORA}),
        (lambda model, _: share_trunk(model, [1, 2, 3], 1), {"upper_layers": 1}),
        (
            lambda model, _: share_trunk(model, [1, 2, 3], 2, train_trunk=True),
            {"upper_layers": 2, "train_trunk": True},
        ),
    ],
    ids=["lora", "frozen trunk", "trained trunk"],
)
def test_members_that_share_a_model_are_counted_as_they_are_held(hold, options):
    model = hold(AutoModelForSequenceClassification.from_config(config(num_labels=1, pad_token_id=0)), LORA)
    result = estimated(members_shape(config(), 3, **options), logits=False)
    assert part(result, "weights") == pytest.approx(sum(p.nbytes for p in model.parameters()), rel=1e-3)  # a head
    assert part(result, "gradients") == sum(p.nbytes for p in model.parameters() if p.requires_grad)


def test_a_critic_is_a_second_network_with_an_optimiser_of_its_own(tmp_path):
    critic = make_critic(AutoModelForCausalLM.from_config(config()), PPOConfig(str(tmp_path)), heads=1)
    shape, trunk = model_shape(config(), dtype="float32"), model_shape(config(), dtype="float32", classifier=True)
    alone, both = estimated(shape, mixed=True), estimated(shape, mixed=True, critic=trunk)
    weights = sum(p.nbytes for p in critic.parameters())
    assert part(both, "critic") == 4 * weights  # and gradient, and AdamW's two states
    assert part(both, "its 16-bit copies") == weights // 2
    assert part(both, "its activations") == part(both, "activations")
    assert both.total - alone.total == 4.5 * weights + part(both, "activations")
    assert {p.name for p in both.parts if p.split} >= {"critic", "its 16-bit copies"}  # FSDP2 shards it


@pytest.mark.parametrize(
    ("packed", "tied", "classifier"),
    [
        (Packed(4), False, False),
        (Packed(4, nested=True), True, False),
        (Packed(4), True, True),
        (Packed(8), False, True),
    ],
    ids=["4 bits", "nested, tied", "4 bits, classifier", "8 bits, classifier"],
)
def test_packed_weights_take_what_bitsandbytes_gives_them(packed, tied, classifier, tmp_path):
    given = config(tie_word_embeddings=tied, pad_token_id=0)
    AutoModelForCausalLM.from_config(given).save_pretrained(tmp_path)
    options = {"load_in_4bit": True, "bnb_4bit_use_double_quant": packed.nested}
    options = options if packed.bits == 4 else {"load_in_8bit": True}
    peft_config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    load = load_sequence_classifier if classifier else load_policy
    quantization = BitsAndBytesConfig(**options)
    model = load(str(tmp_path), dtype="bfloat16", peft_config=peft_config, quantization_config=quantization)
    states = [state for p in model.parameters() if (state := vars(p).get("quant_state")) is not None]
    scales = sum(s.absmax.nbytes + (s.state2.absmax.nbytes if s.nested else 0) for s in states)
    assert bool(states) == (packed.bits == 4)
    measured = scales + sum(p.nbytes for p in model.parameters())
    shape = model_shape(given, dtype="bfloat16", classifier=classifier, peft_config=peft_config, packed=packed)
    assert part(estimated(shape), "weights") == pytest.approx(measured, rel=2e-3)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert part(estimated(shape), "gradients") == sum(p.nbytes for p in trained)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize(
    "model_config",
    [
        config(),
        config(num_hidden_layers=8, hidden_size=64),
        config(num_key_value_heads=1, intermediate_size=512),
        LlamaConfig(vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=8),
        GPT2Config(vocab_size=512, n_embd=128, n_layer=3, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
    ],
    ids=["qwen2", "qwen2-deep", "qwen2-grouped", "llama", "gpt2"],
)
def test_activations_are_within_the_stated_factor(model_config, mixed):
    shape = model_shape(model_config, dtype="float32")
    model = AutoModelForCausalLM.from_config(model_config)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        measured = train_one_step(model)["kept"]
    ratio = part(estimated(shape, mixed=mixed), "activations") / measured
    print(f"ratio {ratio:.2f}")
    assert 1 / ACTIVATIONS_WITHIN < ratio < ACTIVATIONS_WITHIN


def test_no_storage_is_needed_for_a_model_larger_than_the_machine():
    huge = config(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, vocab_size=128_000)
    shape = model_shape(huge, dtype="bfloat16")
    assert 60e9 < shape.parameters < 100e9
    assert part(estimated(shape), "weights") == 2 * shape.parameters
    gc.collect()


def test_a_classifier_has_one_output_and_no_logits():
    shape = model_shape(config(num_labels=1), dtype="float32", classifier=True)
    model = AutoModelForSequenceClassification.from_config(config(num_labels=1))
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert not [part for part in estimated(shape, logits=False).parts if part.name == "logits"]


def test_what_else_a_run_holds_is_counted():
    shape = model_shape(config(), dtype="float32")
    plain = estimated(shape)
    full = estimated(shape, reference=True, engine_width=4, rewards={"runs/reward": shape})
    assert full.total == plain.total + 3 * 4 * shape.parameters
    assert estimated(shape, checkpointing=True).total < plain.total
    lines = full.lines()
    assert lines[-1].split()[0] == "total" and "runs/reward" in lines[-2]
    assert sum(part.bytes for part in full.parts) == full.total < GIB


def test_what_fsdp2_splits_over_processes():
    shape = model_shape(config(), dtype="float32")
    full = estimated(shape, reference=True, engine_width=4, mixed=True, rewards={"runs/reward": shape})
    count = shape.parameters
    whole = part(full, "activations") + part(full, "logits") + 2 * 4 * count  # engine and reward model too
    assert full.split(8) == pytest.approx(whole + (4 + 4 + 8 + 2 + 4) * count / 8, abs=8)
    words = full.lines(8)[-1].split()
    assert words[:3] == ["split", "over", "8"] and "1/8 of weights, gradients, optimiser states" in full.lines(8)[-1]
    assert float(words[3]) == pytest.approx(full.split(8) / 2**20, abs=0.006) and words[4] == "MiB"


def test_reward_models_on_some_ranks_count_there():
    shape = model_shape(config(), dtype="float32")
    plain, size = estimated(shape), 4 * shape.parameters
    ranks = {"a": (2, 3), "b": (3,)}
    found = estimated(shape, rewards={"a": shape, "b": shape, "c": shape}, ranks=ranks)
    assert found.total == plain.total + size and found.split(4) == plain.split(4) + size
    assert found.placed() == {"on rank 2": size, "on rank 3": 2 * size}
    assert estimated(shape, rewards={"a": shape}, ranks=ranks).placed() == {"on ranks 2, 3": size}
    lines = [line.split("   ") for line in found.lines(4)]
    assert lines[-9][0].split() == ["reward", "model"] and lines[-9][-1].endswith(" bytes, on ranks 2, 3 alone")
    names = ["total", "total on rank 2", "total on rank 3", "split over 4", "split on rank 2", "split on rank 3"]
    assert [line[0].strip() for line in lines[-6:]] == names
    assert lines[-6][-1] == "per other process, before FSDP or ZeRO split anything"
    sizes = [float(next(part for part in line[1:] if part.strip()).split()[0]) for line in lines[-6:]]
    expected = [found.total + i * size for i in range(3)] + [found.split(4) + i * size for i in range(3)]
    assert sizes == pytest.approx([number / 2**20 for number in expected], abs=0.006)


@pytest.mark.parametrize(
    ("optim", "width", "expected"),
    [("adamw_torch_fused", 4, 8), ("adamw_torch", 2, 4), ("adamw_8bit", 4, 2), ("sgd", 4, 0)],
)
def test_optimiser_bytes(optim, width, expected):
    assert optimizer_bytes(optim, width)[0] == expected


def test_long_samples_of_a_large_model_with_and_without_a_budget():
    """The figures of docs/on_policy.md."""
    qwen = config(
        vocab_size=152_064, hidden_size=3584, intermediate_size=18_944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, tie_word_embeddings=False,
    )  # fmt: skip
    shape = model_shape(qwen, dtype="float32")
    whole, budget = (
        part(estimated(shape, mixed=True, checkpointing=True, tokens=tokens), "activations") / GIB
        for tokens in (8 * 16_384, 17_408)
    )
    page = " ".join((Path(__file__).parents[2] / "docs" / "on_policy.md").read_text().split())
    assert f"8 samples of 16,384 tokens take {whole:.1f} GiB in a model of {shape.parameters / 1e9:.1f} billion" in page
    assert f"and {budget:.1f} GiB with `tokens_per_batch: 17408`" in page


QWEN_7B = Qwen2Config(
    vocab_size=152_064, hidden_size=3584, intermediate_size=18_944, num_hidden_layers=28, num_attention_heads=28,
    num_key_value_heads=4, tie_word_embeddings=False,
)  # fmt: skip
LLAMA_70B = LlamaConfig(
    vocab_size=128_256, hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80, num_attention_heads=64,
    num_key_value_heads=8, tie_word_embeddings=False,
)  # fmt: skip


@pytest.mark.parametrize(
    ("column", "config", "dtype", "adapter", "processes", "server"),
    [
        (1, QWEN_7B, "float32", None, 4, 1),
        (2, LLAMA_70B, "bfloat16", LoraConfig(r=16, target_modules="all-linear"), 8, 4),
    ],
)
def test_the_recipes_of_the_page_fit(column, config, dtype, adapter, processes, server):
    """docs/launching.md, GiB of a GPU of 80 GB: what `--dry-run` counts, and what FSDP2 gathers."""
    page = (Path(__file__).parents[2] / "docs" / "launching.md").read_text()
    table = page[page.index("| GiB on one GPU, computed") :].splitlines()[2:7]
    split, tokens, gathered, weights, left = (int(row.split("|")[column + 1].split()[0]) for row in table)
    shape = model_shape(config, dtype=dtype, peft_config=adapter)
    found = estimate(
        shape, optim="adamw_torch_fused", mixed=True, checkpointing=True, tokens=8 * (512 + 4 * 256), logits=True,
        reference=adapter is None,
    )  # fmt: skip
    whole = sum(part.bytes for part in found.parts if not part.split)
    assert split == round((found.split(processes) - whole) / GIB) and tokens == round(whole / GIB)
    outer = 2 * config.vocab_size * config.hidden_size
    layer = (shape.parameters - (shape.trainable if adapter else 0) - outer) / config.num_hidden_layers
    assert gathered == round((2 * (outer + 2 * layer) + 4 * (outer + layer) * (adapter is None)) / GIB)
    card = 80e9 / GIB
    assert split + tokens + gathered < 0.8 * card
    assert weights == round(2 * (outer + layer * config.num_hidden_layers) / server / GIB)
    assert left == round(0.9 * card - weights)
