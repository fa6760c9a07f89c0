"""Means of what the micro-batches measure, without waiting for the device."""

from collections.abc import Callable

import torch
from torch import Tensor


class BatchMeans:
    """Means over the pairs of micro-batches. They stay on the device that computed them until `flush`."""

    def __init__(self):
        self._kept: list[tuple[tuple[str, ...], Tensor, int]] = []

    def add(self, values: dict[str, Tensor]) -> None:
        """values: a number per pair [B], by metric."""
        means = torch.stack([column.detach().float().mean() for column in values.values()])
        self._kept.append((tuple(values), means, len(next(iter(values.values())))))

    def flush(self, record: Callable[[str, float, int], None]) -> None:
        """Give all that was added to `record` (metric, mean, pairs), and start anew."""
        if not self._kept:
            return
        read = iter(torch.cat([means for _, means, _ in self._kept]).tolist())  # one wait for all
        for names, _, pairs in self._kept:
            for name in names:
                record(name, next(read), pairs)
        self._kept.clear()
