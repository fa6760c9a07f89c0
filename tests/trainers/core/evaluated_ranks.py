"""Runs that evaluate before they train. Run as a script on two processes: policy, folder, setups."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from align.cli import build
from align.config.resolve import resolve
from align.distributed.shards import whole
from tests.trainers.accelerate_setups import under
from tests.trainers.core.matrix_ranks import command, write_data

CASES = (("sft", "full"), ("sft", "lora"), ("reward", "full"), ("dpo", "full"), ("dpo", "lora"), ("remax", "full"))
MEASURED = ("loss", "logps/chosen", "rewards/margins", "rewards/mean", "entropy", "kl")


class Evaluations(TrainerCallback):
    """{step: metrics} of each evaluation of `train`."""

    def __init__(self):
        self.found: dict[int, dict] = {}

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if state.global_step not in self.found:
            self.found[state.global_step] = numbers(metrics)


def numbers(metrics: dict) -> dict[str, float]:
    return {key: metrics[f"eval_{key}"] for key in MEASURED if f"eval_{key}" in metrics}


def run(method: str, adapter: str, policy: str, data: dict, folder: Path, world: int, *, first: bool) -> dict:
    """first: an evaluation comes before `train`."""
    argv = command(method, "bf16 autocast", adapter, policy, data, world)
    argv += ["--output_dir", str(folder), "--eval_strategy", "steps", "--eval_steps", "3", "--eval_on_start", "true"]
    argv += ["--dataset_test_split", "train[:5]"]
    trainer = build.trainer(resolve(method, None, argv))
    before = numbers(trainer.evaluate()) if first else None
    evaluations = Evaluations()
    trainer.add_callback(evaluations)
    trainer.train()
    after = numbers(trainer.evaluate())
    weights = {name: whole(p.detach()).clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    if hasattr(trainer, "close"):
        trainer.close()
    return {"before": before, "during": evaluations.found, "after": after, "weights": weights}


def compared(policy: str, folder: Path, setup: str, world: int) -> dict:
    """{case: (a run that is evaluated first, one that is not)}"""
    rank = dist.get_rank() if world == 2 else 0
    data = write_data(folder / f"data-{rank}")
    found = {}
    with under(setup):
        for case in CASES:
            runs = [
                run(*case, policy, data, folder / setup / "-".join((*case, str(first))), world, first=first)
                for first in (True, False)
            ]
            found[case] = tuple(runs)
    return found


if __name__ == "__main__":
    policy, folder, setups = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    dist.init_process_group("gloo")
    found = {setup: compared(policy, folder, setup, 2) for setup in setups}
    torch.save(found, folder / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()
