"""SFT, DPO and KTO with `num_logged_completions` and one global batch of 8 rows, on one process or two. As a script:
policy, folder."""

import sys
from pathlib import Path

import torch.distributed as dist

from tests.trainers.core.test_eval_completions import SHOWN, dpo, kto, sft

METHODS = {"sft": sft, "dpo": dpo, "kto": kto}


def train(policy: str, folder: Path, world: int) -> None:
    for name, make in METHODS.items():
        make(policy, folder / name, per_device_train_batch_size=8 // world, **SHOWN).train()


if __name__ == "__main__":
    train(sys.argv[1], Path(sys.argv[2]), 2)
    dist.destroy_process_group()
