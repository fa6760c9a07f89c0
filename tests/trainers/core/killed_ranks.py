"""A run of which one process is killed: in a step, in an evaluation, or while a checkpoint is written. Run as a script
on several processes: policy, folder, one of `CASES`. The others write what ended them, and after how many seconds."""

import os
import signal
import sys
import time
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from align.trainers.core import trainer as core
from align.trainers.sft import SFTTrainer
from tests.trainers.accelerate_setups import under
from tests.trainers.tiny_runs import demonstrations, sft_config

CASES = {  # setup, when, the rank that is killed, of how many; the checkpoint that is left
    "a step": ("ddp", "on_step_end", 2, 3, 1),
    "an evaluation": ("ddp", "on_prediction_step", 0, 3, 1),
    "a checkpoint": ("ddp", "write_extra_state", 1, 4, 1),
    "a checkpoint, fsdp2": ("fsdp2", "write_extra_state", 0, 3, 1),
}
LIMIT = 30  # seconds


def main(policy: str, folder: Path, case: str) -> None:
    setup, when, killed, _, _ = CASES[case]
    at = {"step": 0, "since": 0.0}

    def reach(*args, **kwargs) -> None:
        if at["step"] == 1 and dist.get_rank() == killed:
            os.kill(os.getpid(), signal.SIGKILL)

    class Kill(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            at.update(step=state.global_step, since=time.monotonic())

    if when.startswith("on_"):
        setattr(Kill, when, lambda self, *args, **kwargs: reach())
    write = core.write_extra_state
    writes = lambda *args, **kwargs: (reach(), write(*args, **kwargs))  # noqa: E731
    with under(setup), mock.patch.object(core, "write_extra_state", write if when.startswith("on_") else writes):
        args = sft_config(
            folder / "run", save_strategy="steps", save_steps=1, max_steps=3, eval_strategy="steps", eval_steps=1,
            ddp_timeout=LIMIT,
        )  # fmt: skip
        try:
            SFTTrainer(policy, args, demonstrations(64), demonstrations(8), callbacks=[Kill()]).train()
            said = "trained"
        except Exception as error:  # torch's, of a collective
            said = f"{type(error).__name__}: {error}"
    torch.save({"said": said, "seconds": time.monotonic() - at["since"]}, folder / f"rank{dist.get_rank()}.pt")
    os._exit(0)  # the group cannot be destroyed: one of it is gone


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
