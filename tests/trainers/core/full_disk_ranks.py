"""Runs of which one process finds the disk full, or fails otherwise, while a checkpoint is written: before its folder
is there, in transformers' save, where the others go on to its next collective, in a file of ours, or when it is
flushed. Run as a script on two processes: policy, folder and, for some of them alone, names of `CASES`."""

import errno
import os
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from align.errors import TrainingError
from align.trainers.sft import SFTTrainer
from tests.trainers.accelerate_setups import under
from tests.trainers.tiny_runs import demonstrations, sft_config

CASES = {  # setup, the rank whose disk is full, the file that it cannot write
    "model": ("ddp", 0, "model"),
    "optimizer": ("ddp", 0, "optimizer.pt"),
    "random states": ("ddp", 1, "rng_state_1.pth"),
    "our state": ("ddp", 1, "align_state_1.pt"),
    "manifest": ("ddp", 0, "align_manifest.json.tmp"),
    "flush": ("ddp", 1, "flush"),
    "weights, fsdp2": ("fsdp2", 0, "pytorch_model_fsdp.bin"),
    "shards, fsdp2": ("fsdp2", 1, ".distcp"),
    "folder, fsdp2": ("fsdp2", 0, "folder"),
    "older folder, fsdp2": ("fsdp2", 0, "older"),
    "no memory, fsdp2": ("fsdp2", 0, "memory"),
}


def full(*args, **kwargs) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def without_folders():
    """Whoever makes one."""
    with mock.patch.object(os, "makedirs", full), mock.patch.object(Path, "mkdir", full):
        yield


def without(file: str):
    """A disk on which there is no room for the file."""
    if file == "model":
        return mock.patch.object(PreTrainedModel, "save_pretrained", full)
    if file == "memory":
        return mock.patch.object(PreTrainedModel, "save_pretrained", mock.Mock(side_effect=MemoryError("no memory")))
    if file == "folder":
        return without_folders()
    if file == "older":
        return mock.patch.object(shutil, "rmtree", full)
    if file == "flush":
        return mock.patch.object(os, "fsync", full)
    if file.startswith("align_manifest"):
        return mock.patch("align.trainers.core.trainer.write_manifest", full)
    if file == ".distcp":
        return mock.patch("torch.distributed.checkpoint.FileSystemWriter.write_data", full)
    save = torch.save
    return mock.patch.object(torch, "save", lambda what, to, **kw: full() if str(to).endswith(file) else save(what, to))


def run(policy: str, folder: Path, setup: str, rank: int, file: str) -> str:
    kind = "SHARDED_STATE_DICT" if file == ".distcp" else "FULL_STATE_DICT"
    with under(setup), mock.patch.dict(os.environ, FSDP_STATE_DICT_TYPE=kind):
        args = sft_config(
            folder, save_strategy="steps", save_steps=1, max_steps=2, save_total_limit=1, eval_strategy="steps",
            eval_steps=1, metric_for_best_model="eval_loss",
        )  # fmt: skip
        trainer = SFTTrainer(policy, args, demonstrations(22), demonstrations(2))
        train = trainer._save_checkpoint

        def second(*given):
            if file == "older" and trainer.state.global_step == 2 and dist.get_rank() == rank:
                (folder / "checkpoint-2").mkdir(exist_ok=True)
            with without(file) if trainer.state.global_step == 2 and dist.get_rank() == rank else mock.MagicMock():
                train(*given)

        trainer._save_checkpoint = second
        try:
            trainer.train()
        except TrainingError as error:
            return str(error)
    return "trained"


if __name__ == "__main__":
    policy, folder, *names = sys.argv[1], Path(sys.argv[2]), *sys.argv[3:]
    dist.init_process_group("gloo")
    found = {name: run(policy, folder / name, *CASES[name]) for name in names or CASES}
    torch.save(found, folder / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()
