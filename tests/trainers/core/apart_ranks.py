"""A run that something keeps from adding up its gradients. Run as a script on two processes: policy, folder."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from align import SFTConfig, SFTTrainer
from align.errors import TrainingError
from tests.trainers.tiny_runs import QUIET, demonstrations


def message(policy: str, folder: Path, warm_up: int) -> str:
    """warm_up: steps; the rate of the first is 0."""
    options = {**QUIET, "lr_scheduler_type": "linear", "learning_rate": 1e-6, "max_length": 32}
    args = SFTConfig(str(folder), max_steps=6, warmup_steps=warm_up, per_device_train_batch_size=2, **options)
    trainer = SFTTrainer(policy, args, demonstrations(24))
    held = trainer.accelerator._models
    trainer.accelerator.prepare_model = lambda model, **_: (held.append(model), model)[1]  # no DDP
    try:
        trainer.train()
    except TrainingError as error:
        return str(error)
    return "trained"


if __name__ == "__main__":
    policy, folder = sys.argv[1], Path(sys.argv[2])
    dist.init_process_group("gloo")
    found = {warm_up: message(policy, folder / str(warm_up), warm_up) for warm_up in (0, 3)}
    torch.save(found, folder / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()
