"""A run whose second process finds the disk full when it flushes a checkpoint. Run as a script on two processes:
policy, folder."""

import errno
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from align.errors import TrainingError
from align.trainers.sft import SFTTrainer
from tests.trainers.tiny_runs import demonstrations, sft_config


def full(opened: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


if __name__ == "__main__":
    policy, folder = sys.argv[1], Path(sys.argv[2])
    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        os.fsync = full
    args = sft_config(folder / "run", save_strategy="steps", save_steps=1, max_steps=2, save_total_limit=1)
    found = "trained"
    try:
        SFTTrainer(policy, args, demonstrations(22)).train()
    except TrainingError as error:
        found = str(error)
    torch.save(found, folder / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()
