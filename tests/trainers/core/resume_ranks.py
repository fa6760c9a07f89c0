"""Runs of SFT that others go on from, by what shares the model out. Run as a script on some processes: policy, folder,
setup, what to resume, "" for a run of its own."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from align.errors import AlignError
from align.trainers.sft import SFTTrainer
from tests.trainers.accelerate_setups import under
from tests.trainers.tiny_runs import demonstrations, logged, parameters, sft_config


def run(policy: str, folder: Path, resumed: str = "") -> dict:
    """Of four steps, with a checkpoint after two; what was logged and trained, or the error."""
    options = {"per_device_train_batch_size": 12 // int(os.environ.get("WORLD_SIZE", "1")), "adam_epsilon": 0.1}
    args = sft_config(folder, max_steps=4, save_strategy="steps", save_steps=2, **options)
    try:
        trainer = SFTTrainer(policy, args, demonstrations(48))
        trainer.train(resumed or None)
    except AlignError as error:
        return {"refused": f"{type(error).__name__}: {error}"}
    trainer.save_model(str(folder / "final"))
    return {"loss": logged(trainer, "loss"), "weights": parameters(trainer.model) if not resumed else {}}


if __name__ == "__main__":
    policy, folder, setup, resumed = sys.argv[1], Path(sys.argv[2]), *sys.argv[3:]
    dist.init_process_group("gloo")
    with under(setup):
        found = run(policy, folder / "run", resumed)
    torch.save(found, folder / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()
