"""What happened between two logs: metrics as weighted sums, and the seconds of each phase."""

import time
from collections import defaultdict
from contextlib import contextmanager
from typing import SupportsFloat

from accelerate.utils import gather_object

SQUARES = "/mean of squares"


class Recorder:
    """Collects metrics and phase times until they are logged. Each process has its own."""

    def __init__(self):
        self._sums: dict[str, list[float]] = {}  # metric -> [sum of value * weight, sum of weight]
        self._seconds: dict[str, float] = defaultdict(float)
        self._seconds_within = 0.0  # of the phases that ended within the one that is open

    def record(self, name: str, value: SupportsFloat, weight: SupportsFloat = 1.0) -> None:
        """Add to a metric: the next log shows its weighted mean over the steps and ranks since the last one."""
        entry = self._sums.setdefault(name, [0.0, 0.0])
        entry[0] += float(value) * float(weight)
        entry[1] += float(weight)

    def record_spread(self, name: str, value: SupportsFloat) -> None:
        """Add to `name`/mean and `name`/std of the next log: the standard deviation of all values since the last."""
        self.record(f"{name}/mean", value)
        self.record(f"{name}{SQUARES}", float(value) ** 2)

    @contextmanager
    def phase(self, name: str):
        """Add the time spent inside to `time/<name>` of the next log. A phase within it is counted there only."""
        start, within_outer = time.perf_counter(), self._seconds_within
        self._seconds_within = 0.0
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self._seconds[name] += seconds - self._seconds_within
            self._seconds_within = within_outer + seconds

    def take(self) -> dict[str, float]:
        """The metrics over all processes, and this process's times in seconds; starts anew. All processes must call it
        together."""
        totals: dict[str, list[float]] = {}
        for sums in gather_object([self._sums]):
            for name, (total, weight) in sums.items():
                entry = totals.setdefault(name, [0.0, 0.0])
                entry[0] += total
                entry[1] += weight
        taken = {name: total / weight for name, (total, weight) in totals.items() if weight}
        for name in [name for name in taken if name.endswith(SQUARES)]:
            of = name.removesuffix(SQUARES)
            taken[f"{of}/std"] = max(0.0, taken.pop(name) - taken[f"{of}/mean"] ** 2) ** 0.5
        taken |= {f"time/{name}": seconds for name, seconds in self._seconds.items()}
        self._sums.clear()
        self._seconds.clear()
        return taken
