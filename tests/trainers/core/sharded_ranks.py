"""Runs whose checkpoints are shards of the processes (SHARDED_STATE_DICT), with the activation checkpointing of
accelerate's file. Run as a script on two processes: policy, folder."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.trainers.accelerate_setups import under
from tests.trainers.core.test_saved import lora, make

CASES = {"dpo": None, "dpo lora": lora(), "sft": None, "remax": None}
ROUNDING = {"adam_epsilon": 1e-3}
"""Adam's update of a gradient of nearly 0 is one of its rounding, which two processes have differently from one."""


def train(policy: str, folder: Path) -> dict:
    """By case: the folder that was saved of the whole run, and of the one that went on from its first checkpoint."""
    found = {}
    for case, peft in CASES.items():
        at = folder / case
        options = {**ROUNDING, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 4}
        for name, start in (("whole", None), ("resumed", str(at / "checkpoint-1"))):
            os.environ["FSDP_ACTIVATION_CHECKPOINTING"] = "true"
            trainer = make(case.split()[0], policy, at, peft, **options)
            trainer.train(resume_from_checkpoint=start)
            trainer.save_model(str(folder / f"{case} {name}"))
            if hasattr(trainer, "close"):
                trainer.close()
            trainer.accelerator.wait_for_everyone()
        found[case] = sorted(path.name for path in (at / "checkpoint-2").iterdir())
    return found


if __name__ == "__main__":
    policy, folder = sys.argv[1], Path(sys.argv[2])
    dist.init_process_group("gloo")
    with under("fsdp2"):
        os.environ["FSDP_STATE_DICT_TYPE"] = "SHARDED_STATE_DICT"
        found = train(policy, folder)
    torch.save(found, folder / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()
