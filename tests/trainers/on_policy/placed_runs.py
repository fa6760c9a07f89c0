"""Runs whose reward models are on one of two ranks. Run as a script: policy, folder, reward model."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.trainers.tiny_runs import logged, on_policy, parameters, prompts

KEYS = ("loss", "grad_norm", "reward", "rewards/rm", "eval_proxy", "eval_gold", "eval_disagreement/rm")


def even(completions, **_) -> list[float]:
    """Level for many pairs of answers, on one rank more often than on the other."""
    return [float(len(text) % 2) for text in completions]


def ensemble(path: str, *ranks) -> dict:
    members = [{"type": "classifier", "path": path, "name": f"m{i}", **place} for i, place in enumerate(ranks)]
    return {"type": "ensemble", "name": "rm", "aggregation": "mean", "members": members}


def run(policy: str, folder: Path, path: str, placed: bool, resume: str | None = None, **options) -> dict:
    """What a run logs and ends with; resume: the name of its checkpoint."""
    one, other = ({"ranks": [1]}, {"ranks": [0]}) if placed else ({}, {})
    if resume:
        one, other = other, one  # a run may go on with its models elsewhere
    rewards, gold = [ensemble(path, one, other)], {"type": "classifier", "path": path, "name": "gold", **one}
    if "dynamic_sampling_rounds" in options:
        rewards, options = [*rewards, even], {**options, "reward_weights": [0.0, 1.0]}
    trainer_class, args = on_policy(
        "rloo", folder, per_device_train_batch_size=2, max_steps=3, learning_rate=5e-3, eval_strategy="steps",
        eval_steps=2, save_strategy="steps", save_steps=2, eval_on_start=True, seed=1, **options,
    )  # fmt: skip
    trainer = trainer_class(policy, rewards, args, prompts(24), prompts(5, seed=1), gold_reward=gold)
    joined, join = [], trainer.join_refill

    def counted(step: int) -> None:
        joined.append(step)
        join(step)

    trainer.join_refill = counted
    trainer.train(folder / resume if resume else None)
    keys = (*KEYS, "dynamic_sampling/without_signal", "dynamic_sampling/rounds")
    found = {"logs": {key: logged(trainer, key) for key in keys}, "weights": parameters(trainer.model)}
    found["placed"] = [reward.placed for reward in (*trainer.rewards.rewards, *trainer.gold.rewards)]
    found["joined"] = joined
    trainer.close()
    trainer.accelerator.wait_for_everyone()
    return found


if __name__ == "__main__":
    policy, folder, path = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    refill = {"dynamic_sampling_rounds": 4}
    found = {
        "everywhere": run(policy, folder / "everywhere", path, False),
        "placed": run(policy, folder / "placed", path, True),
        "resumed": run(policy, folder / "placed", path, True, "checkpoint-2"),
        "refill": run(policy, folder / "refill", path, False, **refill),
        "placed refill": run(policy, folder / "placed_refill", path, True, **refill),
    }
    torch.save(found, folder / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()
