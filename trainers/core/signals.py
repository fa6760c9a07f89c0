"""SIGTERM and SIGUSR1, as SLURM sends them before a job's time limit: save, and exit to be queued again."""

import logging
import os
import signal
import threading
import time

import torch
from transformers import TrainerCallback

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: try again
SAME = 2.0
"""Seconds in which signals are one: SLURM sends its own to launcher and trainer, and the launcher passes it on."""


class StopOnSignal(TrainerCallback):
    """While a run trains: the first signal ends it with a checkpoint after the step, a later one ends the process at
    once. `stopped` says whether one came. All processes stop at the same step, whichever of them got the signal."""

    def __init__(self, accelerator):
        self.accelerator, self.stopped, self._before = accelerator, False, {}
        self._first: float | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.stopped, self._first = False, None
        if threading.current_thread() is threading.main_thread():  # no other thread may set handlers
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}

    def _handle(self, number, frame):
        now = time.monotonic()
        if self._first is not None:
            if now - self._first > SAME:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self._first, self.stopped = now, True
        logger.warning("%s: a checkpoint is written after this step, and the run ends", signal.Signals(number).name)

    def on_step_end(self, args, state, control, **kwargs):
        if self.accelerator.num_processes > 1:
            flag = torch.tensor([int(self.stopped)], device=args.device)
            self.stopped = bool(self.accelerator.gather(flag).max())
        if self.stopped:
            control.should_save = control.should_training_stop = True

    def release(self) -> None:
        """Put back the handlers of before. Called when training ends, however it does."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
