"""What happened between two logs: metrics as weighted sums, and the seconds of each phase."""

import time
from collections import defaultdict
from collections.abc import Collection
from contextlib import contextmanager
from typing import SupportsFloat

from accelerate.utils import gather_object

from align.errors import RewardError

SQUARES = "/mean of squares"
OF_EVERY_LOG = ("step", "epoch")  # transformers adds them last


class Recorder:
    """Collects metrics and phase times until they are logged. Each process has its own."""

    def __init__(self):
        self._sums: dict[str, list[float]] = {}  # metric -> [sum of value * weight, sum of weight]
        self._given: dict[str, list[float]] = {}  # the same, of those that the user's functions name
        self._seconds: dict[str, float] = defaultdict(float)
        self._seconds_within = 0.0  # of the phases that ended within the one that is open

    def record(self, name: str, value: SupportsFloat, weight: SupportsFloat = 1.0) -> None:
        """Add to a metric: the next log shows its weighted mean over the steps and ranks since the last one."""
        _add(self._sums, name, float(value) * float(weight), float(weight))

    def record_given(self, name: str, value: SupportsFloat) -> None:
        """As `record`, under a name that a function of the user's chose (TRL's `log_metric`); of two functions that
        chose the same one, the mean of both."""
        _add(self._given, name, float(value), 1.0)

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

    def take(self, others: Collection[str] = ()) -> dict[str, float]:
        """The metrics over all processes, and this process's times in seconds; starts anew. All processes must call it
        together. RewardError if a user's metric has the name of one of the run's own, or of `others`."""
        totals: dict[str, list[float]] = {}
        given: dict[str, list[float]] = {}
        for own, theirs in gather_object([(self._sums, self._given)]):
            for into, sums in ((totals, own), (given, theirs)):
                for name, (total, weight) in sums.items():
                    _add(into, name, total, weight)
        taken = {name: total / weight for name, (total, weight) in totals.items() if weight}
        for name in [name for name in taken if name.endswith(SQUARES)]:
            of = name.removesuffix(SQUARES)
            taken[f"{of}/std"] = max(0.0, taken.pop(name) - taken[f"{of}/mean"] ** 2) ** 0.5
        taken |= {f"time/{name}": seconds for name, seconds in self._seconds.items()}
        taken_twice = sorted(given.keys() & {*taken, *others, *OF_EVERY_LOG})
        if taken_twice:
            raise RewardError(
                f"log_metric({taken_twice[0]!r}, ...): the run logs a number of its own by this name: take another"
            )
        taken |= {name: total / count for name, (total, count) in given.items()}
        self._given.clear()
        self._sums.clear()
        self._seconds.clear()
        return taken


def _add(sums: dict[str, list[float]], name: str, total: float, weight: float) -> None:
    entry = sums.setdefault(name, [0.0, 0.0])
    entry[0] += total
    entry[1] += weight
