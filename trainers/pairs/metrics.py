"""Means of what the micro-batches measure, without waiting for the device."""

from collections.abc import Callable

import torch
from torch import Tensor


class BatchMeans:
    """Means over the pairs of micro-batches. They stay on the device that computed them until `flush`."""

    def __init__(self):
        self._kept: list[tuple[tuple[str, ...], Tensor]] = []

    def add(self, values: dict[str, Tensor], weights: Tensor | None = None) -> None:
        """values: a number per pair [B], by metric. weights: [B], how much each counts; None: all the same."""
        columns = [column.detach().float() for column in values.values()]
        if weights is None:
            means, count = [column.mean() for column in columns], columns[0].new_tensor(len(columns[0]))
        else:
            count = weights.float().sum()
            means = [(column * weights).sum() / count.clamp(min=1e-9) for column in columns]
        self._kept.append((tuple(values), torch.stack([*means, count])))

    def flush(self, record: Callable[[str, float, float], None]) -> None:
        """Give all that was added to `record` (metric, mean, weight), and start anew."""
        if not self._kept:
            return
        read = iter(torch.cat([means for _, means in self._kept]).tolist())  # one wait for all
        for names, _ in self._kept:
            means, count = [next(read) for _ in names], next(read)
            for name, mean in zip(names, means, strict=True):
                if count:
                    record(name, mean, count)
        self._kept.clear()
