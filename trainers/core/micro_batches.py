"""Optimiser steps of any number of micro-batches, whatever transformers counts."""

from contextlib import contextmanager, nullcontext

import torch

from align.trainers.core.trainer import TrainerMixin


def in_lists(batches: list, count: int) -> list[list]:
    """The micro-batches of a step as `count` lists, which transformers counts as its accumulation steps; only the last
    one is sure to hold any."""
    share = -(-len(batches) // count)
    lists = [batches[i : i + share] for i in range(0, len(batches), share)]
    return [[] for _ in range(count - len(lists))] + lists


class MicroBatchLists(TrainerMixin):
    """Of a trainer whose `get_batch_samples` returns lists of micro-batches (`in_lists`)."""

    def training_step(self, model, inputs: list[dict], num_items_in_batch=None):
        total = torch.zeros((), device=self.args.device)
        for number, batch in enumerate(inputs, start=1):
            with nullcontext() if number == len(inputs) else self._goes_on(model):
                total += super().training_step(model, batch, num_items_in_batch)
        return total

    @contextmanager
    def _goes_on(self, model):
        """Around a micro-batch that others of its list follow: gradients are summed over processes, and DeepSpeed takes
        its step, after the last one."""
        state = self.accelerator.gradient_state
        before = state.sync_gradients
        state._set_sync_gradients(False)
        try:
            with self.accelerator.no_sync(model):
                yield
        finally:
            state._set_sync_gradients(before)

    def floating_point_ops(self, inputs: list[dict]) -> int:
        return sum(super(MicroBatchLists, self).floating_point_ops(batch) for batch in inputs)

    def _track_num_input_tokens(self, inputs: list[dict]) -> None:
        for batch in inputs:
            super()._track_num_input_tokens(batch)
