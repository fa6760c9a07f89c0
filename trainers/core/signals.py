"""SIGTERM and SIGUSR1, as SLURM sends them before a job's time limit: save, and exit to be queued again."""

import logging
import os
import signal
import threading
import time
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

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
        self._options: dict[str, Any] = {}  # what the run goes on with, while another value holds for its end

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
            if state.global_step < state.max_steps:
                # a whole checkpoint, also where this step's evaluation is not the best one; the next process trains on
                self._end_with(args, save_only_model=False, save_strategy=SaveStrategy.STEPS)
                self._end_with(args, load_best_model_at_end=False)

    def on_epoch_end(self, args, state, control, **kwargs):
        if self._options and control.should_evaluate:
            control.should_save = True  # once more, with the evaluation

    def on_save(self, args, state, control, **kwargs):
        if self._options:
            self._end_with(args, save_total_limit=None)  # with 1 transformers leaves the best one alone at the end

    def _end_with(self, args, **options) -> None:
        self._options = {name: vars(args)[name] for name in options} | self._options
        vars(args).update(options)

    def release(self, args) -> None:
        """Put back the handlers and options of before. Called when training ends, however it does."""
        vars(args).update(self._options)
        self._options = {}
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
