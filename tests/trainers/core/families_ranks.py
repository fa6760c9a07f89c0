"""DPO of architectures with buffers, or with weights that get no gradient. Run as a script on two processes: a folder
of models by type, a folder, `ddp` or `fsdp2`."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from align.errors import TrainingError
from tests.trainers.accelerate_setups import under
from tests.trainers.core.test_saved import make
from tests.trainers.tiny_runs import logged

KINDS = {"fsdp2": ("gemma4_text", "glm4_moe"), "ddp": ("ernie4_5_moe", "deepseek_v32", "deepseek_v4")}
COMPRESSES = "deepseek_v4"
"""Layers that short rows do not reach: nothing that never gets a gradient."""


def train(model: str, folder: Path, processes: int, **options) -> dict[str, list[float]]:
    """Recomputing activations, as on GPUs: there transformers tells DDP to look for no unused weights."""
    trainer = make(
        "dpo", model, folder, per_device_train_batch_size=8 // processes, gradient_checkpointing=True, **options
    )
    trainer.train()
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    return {name: logged(trainer, name) for name in ("loss", "grad_norm")}


def of_setup(models: Path, folder: Path, setup: str) -> dict:
    found: dict = {}
    for kind in KINDS[setup]:
        model = str(models / kind)
        if kind == COMPRESSES:
            try:
                train(model, folder / kind, 2)
            except TrainingError as error:
                found["refused"] = str(error)
        searched = {"ddp_find_unused_parameters": True} if kind == COMPRESSES else {}
        found[kind] = train(model, folder / kind, 2, **searched)
    return found


if __name__ == "__main__":
    models, folder, setup = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    dist.init_process_group("gloo")
    with under(setup):
        found = of_setup(models, folder, setup)
    torch.save(found, folder / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()
