"""Two steps of every trainer in its defaults on this device: on a GPU bfloat16, checkpointing, FlexAttention, vLLM."""

import importlib.util
import math

import pytest
import torch

from align.lazy import load
from align.methods import METHODS, get_method
from align.modeling.load import load_tokenizer
from tests.trainers.pairs.preference_runs import toy_pairs
from tests.trainers.tiny_runs import demonstrations, discriminator, logged, parameters, prompts, wanted_words

# What a test must give; all else is the default of the method and of the machine.
QUIET = {"report_to": "none", "disable_tqdm": True, "logging_steps": 1, "learning_rate": 1e-3, "max_steps": 2}
# A start of vLLM compiles and captures graphs for 15 s or more: ReMax's is vLLM's default, the others have a quick one.
QUICK = {"backend": "vllm", "kv_cache_gib": 1, "engine_options": {"enforce_eager": True}}
ON_POLICY = {"per_device_train_batch_size": 8, "max_prompt_length": 16, "max_completion_length": 8}
OWN = {
    "modpo": {"objective": "words", "weights": {"words": 0.5, "length": 0.5}},
    "rloo": {"num_generations": 2},
    "grpo": {"num_generations": 2},
    "d2po": {"gold_labels": 4, "gold_label_every": 1},
    "metaapo": {"num_generations": 2, "meta_every": 1},
}


def rollout(method: str):
    """The section `rollout` of a test."""
    if not torch.cuda.is_available():
        return "transformers"  # vLLM takes many seconds to start on a CPU
    if importlib.util.find_spec("vllm") is None:
        return "auto"
    if method == "remax":
        return {"backend": "vllm", "kv_cache_gib": 1}  # the tests beside this one take and give back memory
    return {**QUICK, "sleep": method == "rloo"}


def length(completions, **columns) -> list[float]:
    return [-len(text) / 40 for text in completions]


def trainer_of(method: str, policy: str, folder, **options):
    """The trainer, which has made no step yet."""
    kind = get_method(method).data
    options = {**QUIET, "output_dir": str(folder), "save_strategy": "no", **OWN.get(method, {}), **options}
    if kind == "prompts":
        options = {**ON_POLICY, "rollout": rollout(method), **options}
    config, trainer = load(get_method(method).config)(**options), load(get_method(method).trainer)
    if method == "d2po":
        ranks = discriminator(load_tokenizer(policy))
        return trainer(policy, ranks, config, prompts(32), gold_reward=wanted_words)
    if kind == "prompts":
        return trainer(policy, wanted_words, config, toy_pairs(32) if get_method(method).offline_pairs else prompts(32))
    if method == "modpo":
        return trainer(policy, [length], config, toy_pairs(32))
    return trainer(policy, config, demonstrations(32) if method == "sft" else toy_pairs(32))


def close(trainer, method: str) -> None:
    if get_method(method).data == "prompts":
        trainer.close()


@pytest.mark.parametrize("method", METHODS)
def test_two_steps_in_its_defaults(method, policy, tmp_path, device):
    trainer = trainer_of(method, policy, tmp_path)
    before = parameters(trainer.model)
    trainer.train()
    if get_method(method).data == "prompts" and device == "cuda":
        assert trainer.engine.name == ("vllm" if importlib.util.find_spec("vllm") else "transformers")
    close(trainer, method)
    assert next(trainer.model.parameters()).device.type == device
    assert trainer.args.bf16 == (device == "cuda" and torch.cuda.is_bf16_supported())
    losses = logged(trainer, "loss")
    assert len(losses) >= 2 and all(map(math.isfinite, losses)), losses
    after = parameters(trainer.model)
    moved = [name for name in before if not torch.equal(before[name].to(device), after[name].to(device))]
    assert len(moved) > len(before) / 2, moved


@pytest.mark.parametrize("method", ["dpo", "remax"])
def test_resume(method, policy, tmp_path, device):
    """Three steps are one step, a checkpoint, and two more."""
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    if method == "remax":
        options["rollout"] = rollout("rloo")
    whole = trainer_of(method, policy, tmp_path / "whole", **options)
    whole.train()
    close(whole, method)
    resumed = trainer_of(method, policy, tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    close(resumed, method)
    # on a GPU sums are taken in no fixed order, and their last bits differ from run to run
    tolerance = {"rtol": 0.02, "atol": 2e-3} if device == "cuda" else {"rtol": 0, "atol": 0}
    for name, weight in parameters(whole.model).items():
        torch.testing.assert_close(
            parameters(resumed.model)[name], weight, **tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
