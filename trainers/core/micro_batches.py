"""Optimiser steps of any number of micro-batches, whatever transformers counts."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from align.trainers.core import guards
from align.trainers.core.trainer import TrainerMixin


def in_lists(batches: list, count: int) -> list[list]:
    """The micro-batches of a step in their order, in `count` lists of lengths as equal as can be, which transformers
    counts as its accumulation steps. The last list is not empty."""
    ends = [len(batches) * i // count for i in range(count + 1)]
    return [batches[start:end] for start, end in pairwise(ends)]


class MicroBatchLists(TrainerMixin):
    """Of a trainer whose `get_batch_samples` returns lists of micro-batches (`in_lists`)."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._step_loss = torch.zeros((), device=self.args.device)

    def training_step(self, model: nn.Module, inputs: list, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Some micro-batches of a step. The last ones return the loss of the whole step, the others 0."""
        ends_step = self.accelerator.sync_gradients
        with self.phase("train"):
            for number, batch in enumerate(inputs, start=1):
                with nullcontext() if ends_step and number == len(inputs) else self._before_last(model):
                    # not TrainerMixin's, which waits for the device after each to look at its loss
                    self._step_loss += super(TrainerMixin, self).training_step(model, batch, num_items_in_batch)
        loss = torch.zeros((), device=self.args.device)
        if ends_step:
            loss, self._step_loss = self._step_loss, loss
            self.check_step(loss)
        return loss

    def check_step(self, loss: Tensor) -> None:
        """Before the update, once per step: a TrainingError if the loss of the step is not finite."""
        guards.check_loss(loss, self.state.global_step + 1)

    @contextmanager
    def _before_last(self, model: nn.Module) -> Iterator[None]:
        """Around a micro-batch that is not the last of its step: gradients are summed over processes, and DeepSpeed
        takes its step, after the last one. With accelerate's `sync_each_batch`, which `sums` sets under FSDP2, they are
        summed after each, so that a process keeps its share of them and not the whole."""
        before, self.accelerator.sync_gradients = self.accelerator.sync_gradients, False
        try:
            each = self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
            with nullcontext() if each else self.accelerator.no_sync(model):
                yield
        finally:
            self.accelerator.sync_gradients = before

    def floating_point_ops(self, inputs: list) -> int:
        return sum(super(MicroBatchLists, self).floating_point_ops(batch) for batch in inputs)

    def _track_num_input_tokens(self, inputs: list) -> None:
        for batch in inputs:
            super()._track_num_input_tokens(batch)
