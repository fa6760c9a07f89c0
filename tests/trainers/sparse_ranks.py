"""SparsePO and MaPO with one global batch of 8 pairs, on one process or two. Run as a script: policy, folder."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig
from preference_runs import history, toy_pairs
from sparse_runs import SparsePOTrainer, config
from tiny_runs import parameters

NAMES = ("loss", "grad_norm", "kl/chosen", "mask_u_mean/chosen", "mask_u_sparsity/rejected", "eval_loss")
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
CASES = {
    "common": {"mask_dropout": 0.0, "mask_l1_kl": 0.01},
    "independent, LoRA": {"variant": "independent", "mask_dropout": 0.0},
    "mapo": {"variant": "mapo"},
}


def train(policy: str, folder: Path, world: int) -> dict[str, dict]:
    """What was logged and the final weights, masks among them, by case."""
    found = {}
    for name, options in CASES.items():
        args = config(
            folder / name.partition(",")[0],
            per_device_train_batch_size=4 // world,
            gradient_accumulation_steps=2,
            per_device_eval_batch_size=2,
            max_steps=4,
            eval_strategy="steps",
            eval_steps=2,
            **options,
        )
        lora = LoraConfig(**LORA) if "LoRA" in name else None
        trainer = SparsePOTrainer(policy, args, toy_pairs(24), toy_pairs(8, seed=1), peft_config=lora)
        trainer.train()
        found[name] = {"logs": history(trainer, *NAMES), "weights": parameters(trainer.model)}
    return found


if __name__ == "__main__":
    found = train(sys.argv[1], Path(sys.argv[2]), 2)
    torch.save(found, Path(sys.argv[2]) / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()
