"""SRPO with one global batch of 8, on one process or two. Run as a script: policy, folder."""

import json
import sys
from pathlib import Path

import torch.distributed as dist

from align.data import toy
from tests.trainers.pairs.preference_runs import toy_pairs
from tests.trainers.test_srpo import make
from tests.trainers.tiny_runs import logged, tiny_model

KEYS = ("loss", "grad_norm", "generator/loss", "improver/loss", "improver/accuracies", "rewards/margins", "eval_loss")


def train(policy: str, folder: Path, world: int) -> dict:
    """The large epsilon keeps AdamW from making whole steps of rounding errors."""
    options = {"per_device_train_batch_size": 8 // world, "learning_rate": 5e-3, "adam_epsilon": 0.1, "max_steps": 4}
    options |= {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 3}
    reference = tiny_model(toy.tokenizer(), seed=5)
    trainer = make(policy, folder, eval_rows=toy_pairs(10, seed=1), ref_model=reference, **options)
    trainer.train()
    return {key: logged(trainer, key) for key in KEYS}


if __name__ == "__main__":
    found = train(sys.argv[1], Path(sys.argv[2]), 2)
    Path(sys.argv[2]).with_suffix(f".{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
