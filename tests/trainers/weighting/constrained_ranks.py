"""Runs whose weightings learn, with one global batch of 8, on one process or two, with DDP and with FSDP2.

Run as a script: policy, folder.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from align.data import toy
from align.distributed.shards import whole
from tests.trainers.accelerate_setups import under
from tests.trainers.tiny_runs import on_policy, prompts, wanted_words

LEARNED = ("loss", "grad_norm", "kl", "reward", "entropy", "constraints/", "dynamic_weights/", "eval_")
HELD = [
    {"reward": "polite", "direction": "at_least", "threshold": 0.6},
    {"reward": "wanted_words", "direction": "at_most", "threshold": 0.1},
]
RUNS = {
    "multipliers": ("rloo", {"constraints": HELD, "multipliers": {"update_per": "mini_batch", "learning_rate": 1.0}}),
    "pid, tokens, standardised": (
        "remax",
        {"constraints": HELD, "multipliers": {"pid": {}, "estimator": "token_mean", "standardize": True}},
    ),
    "gradients": ("rloo", {"dynamic_weights": {"type": "gradient", "learning_rate": 1.0, "mu": 100.0}}),
    "search": (
        "rloo",
        {
            "constraints": [{"reward": "polite", "direction": "equal"}],
            "multipliers": {"pid": {}},
            "threshold_search": {"start": {"polite": 0.2}, "reached": {"polite": 0.8}, "budget": 2, "steps": 2},
        },
    ),
}
SHARDED = {f"{name}, fsdp2": RUNS[name] for name in ("multipliers", "pid, tokens, standardised")}


def polite(completions, **columns) -> list[float]:
    return [float(any(word in toy.POLITE for word in text.split())) for text in completions]


def train(policy: str, folder: Path, world: int, runs: dict = RUNS) -> dict[str, dict]:
    found = {}
    for name, (method, options) in runs.items():
        kind, args = on_policy(
            method, folder / name, per_device_train_batch_size=4 // world, gradient_accumulation_steps=2,
            num_mini_batches=2, num_generations=2, max_steps=4, learning_rate=5e-3, kl_in="reward",
            eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=2, **options,
        )  # fmt: skip
        data = prompts(32), prompts(5, seed=1)
        trainer = kind(policy, [polite, wanted_words], args, *data, gold_reward="align.data.toy:gold")
        trainer.train()
        logs = [{k: v for k, v in entry.items() if k.startswith(LEARNED)} for entry in trainer.state.log_history]
        weights = {name: whole(p).clone() for name, p in trainer.model.named_parameters()}
        found[name] = {"logs": logs, "weights": weights}
        trainer.close()
    return found


if __name__ == "__main__":
    policy, folder = sys.argv[1], Path(sys.argv[2])
    dist.init_process_group("gloo")
    found = train(policy, folder, 2)
    with under("fsdp2"):
        found |= train(policy, folder, 2, SHARDED)
    torch.save(found, folder / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()
