"""DPO, and KTO, with one global batch of 8 rows, on one process or two. Run as a script: policy, folder."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from align.modeling.load import load_tokenizer
from align.trainers.dpo import DPOTrainer
from align.trainers.kto import KTOConfig, KTOTrainer
from tests.trainers.pairs.preference_runs import dpo_config, history, toy_pairs
from tests.trainers.tiny_runs import QUIET, parameters, tiny_model

NAMES = ("loss", "grad_norm", "rewards/margins", "logps/chosen", "eval_loss", "eval_rewards/margins")
CASES = {
    "live": {},
    "cached": {"precompute_ref_log_probs": True},
    "budget": {"tokens_per_batch": 70},
    "budget, as many on each": {"tokens_per_batch": 40},
    "kto": {"beta": 0.3},
}


def train(policy: str, folder: Path, world: int) -> dict[str, dict]:
    """What was logged and the final weights, by case. 24 pairs: three steps per epoch."""
    found = {}
    for name, options in CASES.items():
        settings = {
            "per_device_train_batch_size": 4 // world,
            "gradient_accumulation_steps": 2,
            "per_device_eval_batch_size": 2,
            "max_steps": 4,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "learning_rate": 2e-3,
            **options,
        }
        eval_rows = toy_pairs(8, seed=1)
        if name == "kto":
            args = KTOConfig(**QUIET, output_dir=str(folder / name), max_length=32, **settings)
            other = tiny_model(load_tokenizer(policy), seed=5)  # so that the reference point is not 0
            trainer = KTOTrainer(policy, args, toy_pairs(12), eval_rows, ref_model=other)
        else:
            args = dpo_config(folder / name.partition(",")[0], **settings)
            trainer = DPOTrainer(policy, args, toy_pairs(24), eval_rows)
        trainer.train()
        found[name] = {"logs": history(trainer, *NAMES), "weights": parameters(trainer.model)}
    return found


if __name__ == "__main__":
    found = train(sys.argv[1], Path(sys.argv[2]), 2)
    torch.save(found, Path(sys.argv[2]) / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()
