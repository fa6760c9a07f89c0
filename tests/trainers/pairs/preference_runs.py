"""Preference pairs of the toy world, and short quiet DPO runs on them."""

import torch
from datasets import Dataset

from align.data import toy
from tests.trainers.tiny_runs import QUIET, logged

CHOSEN = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen")


def toy_pairs(count: int, seed: int = 0) -> Dataset:
    """Two answers to a prompt, the one with the higher gold score chosen; columns prompt, chosen, rejected."""
    rows = toy.reference_text(toy.split_prompts(seed, 3 * count)[0], 2, seed)
    pairs = []
    for a, b in zip(rows[::2], rows[1::2], strict=True):
        better, worse = sorted((a, b), key=lambda row: -toy.gold_score(row["topic"], row["completion"]))
        if better["completion"] != worse["completion"]:
            pairs.append({"prompt": a["prompt"], "chosen": better["completion"], "rejected": worse["completion"]})
    return Dataset.from_list(pairs[:count])


def dpo_config(folder, **options):
    from align.trainers.dpo import DPOConfig

    defaults = {
        **QUIET,
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "max_length": 32,
        "max_steps": 2,
        "learning_rate": 1e-3,
    }
    return DPOConfig(**{**defaults, **options})


def history(trainer, *names) -> dict[str, torch.Tensor]:
    """What was logged under each name, by step."""
    return {name: torch.tensor(logged(trainer, name)) for name in (names or ("loss", "grad_norm", *CHOSEN))}


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], rtol=1e-5, atol=1e-6) -> None:
    for name, values in expected.items():
        assert len(values)
        torch.testing.assert_close(actual[name], values, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def assert_same_run(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The first step but for rounding, what follows but for what Adam makes of it: an update of a gradient that is
    nearly zero is as large as any other, and which way it goes is up to the last bit, in which processors differ."""
    first = {name: values[:1] for name, values in expected.items() if not name.startswith("eval")}
    assert_close({name: actual[name][:1] for name in first}, first, rtol=2e-5, atol=5e-6)
    assert_close(actual, expected, rtol=1e-3, atol=1e-4)
