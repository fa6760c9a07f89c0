"""LongRoPE: one table of frequencies for all rows of a run, as its longest sequence needs, in trainer and engine."""

import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, Phi3Config, Phi3ForCausalLM, Phi3ForSequenceClassification

from align import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from align.errors import ConfigError, DataError, TrainingError
from align.modeling.load import load_policy
from align.modeling.logprobs import token_logps
from align.modeling.rotary import LONG, RECORD, SHORT, choose_factors, factors_of, recorded
from align.reward_models.classifier import ClassifierReward
from align.rollout import SamplingParams, make_engine
from tests.trainers.tiny_runs import QUIET, logged, needs_vllm, on_policy, prompts, wanted_words

ORIGINAL = 32
PAIR = {"prompt": "describe the garden : ", "chosen": "rose soil", "rejected": "wave"}
LONGER = {**PAIR, "chosen": "rose soil " * 20}
BACKENDS = ["transformers", pytest.param("vllm", marks=needs_vllm)]


def phi(tokenizer, kind=Phi3ForCausalLM, **options):
    """Of two layers; the two tables differ by far more than rounding."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4}
    config = Phi3Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=256, original_max_position_embeddings=ORIGINAL, initializer_range=0.1,
        rope_parameters={**rope, "short_factor": [1.0] * 16, "long_factor": [i + 1.5 for i in range(16)]},
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **options,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(config).eval()


def rows(lengths, tokenizer):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(4, len(tokenizer), (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def logps(model, sequences, left=0):
    """Of each row's tokens, [length - 1], computed together, with so much padding before them at least."""
    longest = left + max(map(len, sequences))
    ids = torch.tensor([[5] * (longest - len(row)) + row for row in sequences])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in sequences])
    return [found[-len(row) + 1 :] for found, row in zip(token_logps(model, ids, mask), sequences, strict=True)]


def test_a_row_does_not_depend_on_its_neighbours(tokenizer):
    short, long = rows((12, 60), tokenizer)
    model = phi(tokenizer)
    assert (logps(model, [short])[0] - logps(model, [short, long])[0]).abs().max() > 0.1  # transformers' own choice
    found = {}
    for limit, kind in ((ORIGINAL, SHORT), (ORIGINAL + 1, LONG)):
        choose_factors(model, limit)
        assert factors_of(model) == kind
        found[kind] = logps(model, [short])[0]
        torch.testing.assert_close(logps(model, [short], left=40)[0], found[kind], rtol=1e-4, atol=1e-4)
        together = logps(model, [short, long])
        torch.testing.assert_close(together[0], found[kind], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logps(model, [long])[0], together[1], rtol=1e-4, atol=1e-4)
    assert (found[SHORT] - found[LONG]).abs().max() > 0.1
    plain = phi(tokenizer)  # of short text
    torch.testing.assert_close(logps(plain, [short])[0], found[SHORT], rtol=0, atol=0)
    torch.testing.assert_close(logps(model, [long])[0], logps(plain, [long])[0], rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_engines_take_the_same(backend, tokenizer):
    """Two engines that live in one process, of which vLLM would give the second the first one's table."""
    engines = []
    for limit, kind, lengths in ((ORIGINAL, SHORT, (6, 20)), (80, LONG, (6, 70))):
        model = phi(tokenizer)
        choose_factors(model, limit)
        engine = make_engine(model, tokenizer, backend=backend, max_model_len=limit)
        given = rows(lengths, tokenizer)
        made = engine.generate(given, SamplingParams(8))
        for prompt, rollout in zip(given, made, strict=True):
            (answer,) = rollout.completions
            own = logps(model, [prompt + answer.token_ids])[0][len(prompt) - 1 :]
            torch.testing.assert_close(torch.tensor(answer.logprobs), own, rtol=1e-3, atol=1e-3)
        engines.append(engine)
        with pytest.raises(ConfigError, match=f"LongRoPE: the model takes the factors for {kind} sequences"):
            make_engine(model, tokenizer, backend=backend, max_model_len=112 - limit)
    for engine in engines:
        engine.close()
    loose = phi(tokenizer)
    make_engine(loose, tokenizer, backend="transformers", max_model_len=80).close()
    assert factors_of(loose) == LONG


def dpo(tokenizer, folder, model=None, data=None, **options):
    args = {"output_dir": str(folder), "max_steps": 1, "max_length": 60, "learning_rate": 1e-2, **QUIET, **options}
    data = Dataset.from_list(data or [PAIR, LONGER] * 4)
    return DPOTrainer(model or phi(tokenizer), DPOConfig(**args), data, processing_class=tokenizer)


@pytest.mark.parametrize("batching", ["padded", "shared_prefix"])
def test_dpo(batching, tokenizer, tmp_path):
    """Policy and reference; what is saved says it, and the next run decides for itself."""
    short, long = rows((12, 50), tokenizer)
    trainer = dpo(tokenizer, tmp_path, batching=batching, per_device_train_batch_size=2)
    assert [factors_of(model) for model in (trainer.model, trainer.ref_model)] == [LONG, LONG]
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(0.6931, abs=1e-4)  # the policy is its reference
    trainer.save_model()
    saved = load_policy(str(tmp_path))
    assert recorded(saved) == LONG and json.loads((tmp_path / "config.json").read_text())[RECORD] == LONG
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()  # transformers: by the longest of a batch
    torch.testing.assert_close(logps(plain, [short, long]), logps(trainer.model.eval(), [short, long]))
    assert (logps(plain, [short])[0] - logps(trainer.model, [short])[0]).abs().max() > 0.1
    later = dpo(tokenizer, tmp_path / "later", saved, [PAIR] * 4, max_length=ORIGINAL)
    assert factors_of(later.model) == factors_of(later.ref_model) == SHORT and recorded(later.model) is None
    # the rows decide where there is no max_length
    kinds = [factors_of(dpo(tokenizer, tmp_path, None, data, max_length=None).model) for data in ([PAIR] * 4, None)]
    assert kinds == [SHORT, LONG]


def test_cached_log_probs_know_the_factors(tokenizer, tmp_path):
    """Of the same rows and weights, in one folder."""
    cache = {"precompute_ref_log_probs": True, "ref_log_probs_dir": str(tmp_path / "cache")}
    for limit in (ORIGINAL, 60):
        trainer = dpo(tokenizer, tmp_path / str(limit), data=[PAIR] * 4, max_length=limit, **cache)
        trainer.train()
        assert logged(trainer, "loss")[0] == pytest.approx(0.6931, abs=1e-4)


def test_batches_of_a_run_do_not_matter(tokenizer, tmp_path):
    found = []
    for size in (1, 4):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size, "max_steps": 2}
        trainer = dpo(tokenizer, tmp_path, **options)
        trainer.train()
        found.append([*logged(trainer, "loss"), *logged(trainer, "grad_norm")])
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_a_resume_keeps_the_factors(tokenizer, tmp_path):
    model = phi(tokenizer)
    options = {"save_strategy": "steps", "save_steps": 1}
    dpo(tokenizer, tmp_path, model, [PAIR] * 4, **options).train()
    with pytest.raises(TrainingError, match="of another run .rope_factors: 'long' before, None now"):
        changes = {"max_length": ORIGINAL, "resume_changes": ["max_length"], "max_steps": 2}
        dpo(tokenizer, tmp_path, phi(tokenizer), [PAIR] * 4, **options, **changes).train(resume_from_checkpoint=True)
    again = dpo(tokenizer, tmp_path, phi(tokenizer), [PAIR] * 4, **options | {"max_steps": 2})
    again.train(resume_from_checkpoint=True)
    assert factors_of(again.model) == LONG


@pytest.mark.parametrize("options", [{}, {"padding_free": True}, {"packing": True}], ids=str)
def test_sft(options, tokenizer, tmp_path):
    """Packed rows are as long as their documents."""
    losses = []
    for cut in ({"per_device_train_batch_size": 1}, {"per_device_train_batch_size": 4, **options}):
        args = {"output_dir": str(tmp_path), "max_steps": 1, "max_length": 64, "shuffle_dataset": False, **QUIET}
        data = Dataset.from_list([PAIR, LONGER, PAIR, PAIR])
        trainer = SFTTrainer(phi(tokenizer), SFTConfig(**args | cut), data, data, processing_class=tokenizer)
        assert factors_of(trainer.model) == LONG
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    if "packing" in options:
        args |= {**options, "max_length": 100}
        trainer = SFTTrainer(phi(tokenizer), SFTConfig(**args), Dataset.from_list([PAIR] * 20), None, tokenizer)
        assert factors_of(trainer.model) == SHORT


@pytest.mark.parametrize("streamed", [False, True], ids=["rows", "stream"])
def test_sft_of_short_rows(streamed, tokenizer, tmp_path):
    """`max_length` decides, as in every method: a stream's rows are not known."""
    data = Dataset.from_list([PAIR] * 4)
    for limit, kind in ((ORIGINAL, SHORT), (ORIGINAL + 1, LONG)):
        args = SFTConfig(output_dir=str(tmp_path), max_steps=1, max_length=limit, **QUIET)
        data_of = data.to_iterable_dataset() if streamed else data
        trainer = SFTTrainer(phi(tokenizer), args, data_of, processing_class=tokenizer)
        assert factors_of(trainer.model) == kind and trainer.args.max_length == limit


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_a_reward_model_is_read_as_it_was_trained(lora, tokenizer, tmp_path):
    phi(tokenizer, Phi3ForSequenceClassification, num_labels=1).save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    peft = LoraConfig(r=4, target_modules=["qkv_proj"], task_type="SEQ_CLS") if lora else None
    for limit, kind in ((ORIGINAL, SHORT), (80, LONG)):
        folder = tmp_path / kind
        args = RewardConfig(output_dir=str(folder), max_steps=1, max_length=limit, **QUIET)
        trainer = RewardTrainer(str(tmp_path / "start"), args, Dataset.from_list([PAIR] * 4), peft_config=peft)
        trainer.train()
        trainer.save_model()
        reward = ClassifierReward(str(folder), device="cpu")
        assert factors_of(reward.model) == factors_of(trainer.model) == kind
        long = rows((60,), tokenizer)
        if kind == LONG:
            short = rows((12,), tokenizer)
            torch.testing.assert_close(reward.score_ids(short + long)[:1], reward.score_ids(short))
        assert reward.encoder.longest == (ORIGINAL if kind == SHORT else 256)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", ["rloo", "ppo"])
def test_on_policy(method, backend, tokenizer, tmp_path):
    """Every step compares the log-probs of trainer and engine, and at the start those of the reference."""
    for prompt, completion, kind in ((16, 40, LONG), (16, 8, SHORT)):
        options = {"max_prompt_length": prompt, "max_completion_length": completion, "rollout_backend": backend}
        trainer_class, args = on_policy(method, tmp_path / kind, **options)
        trainer = trainer_class(phi(tokenizer), wanted_words, args, prompts(16), processing_class=tokenizer)
        trainer.train()
        models = [trainer.model, trainer.ref_model, *([trainer.critic.model] if method == "ppo" else [])]
        assert [factors_of(model) for model in models] == [kind] * len(models)
        assert max(logged(trainer, "rollout/p99_abs_logp_diff")) < 1e-3
        trainer.close()


def test_default_prompts_are_lowered_within_the_short_factors(tokenizer, tmp_path):
    trainer_class, args = on_policy("rloo", tmp_path, max_prompt_length=512, max_completion_length=8)
    trainer_class(phi(tokenizer), wanted_words, args, prompts(8), processing_class=tokenizer).close()
    assert args.max_prompt_length == ORIGINAL - 8


def test_rows_beyond_what_the_factors_reach(tokenizer, tmp_path):
    with pytest.raises(DataError, match="longer than the 256 tokens"):
        dpo(tokenizer, tmp_path, data=[{**PAIR, "chosen": "rose " * 300}] * 2, max_length=None)
