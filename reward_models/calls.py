"""The calls of a reward function: one after another, in threads, or awaited together, each within a deadline."""

import asyncio
import functools
import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from align.errors import RewardError
from align.reward_models.base import Reward, RewardBatch, RewardOutput, joined
from align.reward_models.beside import Flight, OnLoop, Threads
from align.reward_models.deadlines import DeadlineExceeded, call_within
from align.reward_models.early import Early, EarlyPieces, at_once
from align.reward_models.failures import Failed, Failures
from align.reward_models.functions import UserFunction, check_concurrency

TIMEOUT = 600.0  # seconds of a call, unless the spec says otherwise


def plain(value: Any) -> Any:
    """A single number of numpy or torch as Python's; anything else as it is."""
    if isinstance(value, np.generic | np.ndarray | torch.Tensor) and value.reshape(-1).shape == (1,):
        return value.item()
    return value


@dataclass
class Log:
    """What a function of the user's logs (TRL's `log_metric` and `log_extra`)."""

    metrics: dict[str, list[float]] = field(default_factory=dict)
    columns: dict[str, list] = field(default_factory=dict)

    def log_metric(self, name: str, value: float) -> None:
        """NaN, the mean of nothing, is no value, as in TRL's logs."""
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):  # the latter of a tensor with several
            number = math.inf
        if not isinstance(name, str) or math.isinf(number):
            raise RewardError(f"log_metric({name!r}, {value!r:.80}): it takes a name and a finite number")
        if not math.isnan(number):
            self.metrics.setdefault(name, []).append(number)

    def log_extra(self, column: str, values: Sequence) -> None:
        if not isinstance(column, str) or isinstance(values, str) or not hasattr(values, "__iter__"):
            raise RewardError(f"log_extra({column!r}, {values!r:.80}): it takes a name and one value per completion")
        self.columns[column] = [v if isinstance(v, int | float) else str(v) for v in map(plain, values)]


@dataclass
class Call:
    """indices: of the completions in the batch. arguments: of the function."""

    indices: Sequence[int]
    arguments: dict[str, Any]
    log: Log = field(default_factory=Log)


class Calls:
    """Makes the calls of a reward.

    Args:
        read: from what a call returned to one number, None or `Failed` per completion; raises `RewardError` when that
            cannot be done. blame: the error to raise for one that a call has raised.
        concurrency: of an async function, calls in flight; of a plain one, threads, None for none. timeout: seconds of
            a call.
    """

    def __init__(
        self,
        function: UserFunction,
        failures: Failures,
        read: Callable[[Any, Call, RewardBatch], list],
        blame: Callable[[Exception, Call, RewardBatch], Exception],
        concurrency: int | None,
        timeout: float,
    ):
        self.function, self.failures, self.reward = function, failures, failures.reward
        self.read, self.blame = read, blame
        self.concurrency, self.timeout = check_concurrency(function, concurrency), timeout

    @property
    def beside(self) -> bool:
        """Whether they are made beside this thread."""
        return self.concurrency is not None

    def flight(self, count: int) -> Flight:
        """For so many calls beside this thread."""
        assert self.concurrency is not None
        if not self.function.is_async:
            return Flight(Threads(self.concurrency))
        return Flight(OnLoop(self.concurrency), seconds=self.timeout * -(-count // self.concurrency) + 10)

    def work(self, call: Call, batch: RewardBatch) -> Callable[[], Any]:
        """What makes the call in a flight: its outcomes, which are still to be counted."""
        return functools.partial(self._awaited if self.function.is_async else self._made, call, batch)

    def run(self, calls: list[Call], batch: RewardBatch) -> list[float | None | Failed]:
        """The outcomes of all completions, in their order, made one after another in this thread."""
        found: list[float | None | Failed] = []
        for call in calls:
            outcomes = self._made(call, batch)
            self.failures.count(outcomes, call.indices, batch)
            found += outcomes
        return found

    def _made(self, call: Call, batch: RewardBatch) -> list:
        try:
            result = call_within(self.timeout, functools.partial(self.function.call, **call.arguments))
            outcomes = self.read(result, call, batch)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # also what is no Exception: it is the function's, not ours
            outcomes = self._failed(error, call, batch)
        return outcomes

    async def _awaited(self, call: Call, batch: RewardBatch) -> list:
        try:
            try:
                async with asyncio.timeout(self.timeout) as scope:
                    result = await self.function.call(**call.arguments)
            except TimeoutError:
                raise (DeadlineExceeded if scope.expired() else TimeoutError) from None
            outcomes = self.read(result, call, batch)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                raise  # from outside; else the function has raised it
            outcomes = self._failed(error, call, batch)
        return outcomes

    def _failed(self, error: BaseException, call: Call, batch: RewardBatch) -> list:
        if isinstance(error, DeadlineExceeded):
            reason = f"{self.function.source} did not return within {self.timeout:g} s"
        else:
            reason = f"{self.function.source} failed with {type(error).__name__}: {error}"
        if not self.failures.stops:
            return [Failed(reason)] * len(call.indices)
        where = batch.row_names(call.indices) if len(call.indices) > 1 else batch.row_name(call.indices[0])
        if isinstance(error, DeadlineExceeded):
            raise RewardError(
                f"reward {self.reward!r}: {reason} for {where}. Mend it, raise timeout, or say what becomes of such "
                "completions with on_error"
            ) from None
        if isinstance(error, SystemExit):
            raise RewardError(f"reward {self.reward!r}: {self.function.source} wanted to exit at {where}") from error
        if not isinstance(error, Exception) or isinstance(error, StopIteration | StopAsyncIteration):
            # these would mean something else to the loops that they pass through
            raise RewardError(f"reward {self.reward!r}: {reason} for {where}") from error
        blamed = self.blame(error, call, batch)
        if blamed is error:
            raise blamed
        raise blamed from error


class CalledReward(Reward):
    """A reward that is calls of a function, each about some of the completions."""

    function: UserFunction
    failures: Failures
    calls: Calls

    @property
    def may_log(self) -> bool:
        return "log_metric" in self.function.accepts

    @abstractmethod
    def _pieces(self, count: int) -> list[range]:
        """The indices that each call is about, of so many completions."""

    @abstractmethod
    def _call(self, batch: RewardBatch, indices: range) -> Call: ...

    @abstractmethod
    def _output(self, calls: list[Call], outcomes: list, batch: RewardBatch) -> RewardOutput: ...

    def begin(self, batch: RewardBatch, *, user_code: bool) -> Early | None:
        return self._early(batch.copied()) if self.calls.beside and (user_code or self.function.ours) else None

    def _score(self, batch: RewardBatch) -> RewardOutput:
        if self.calls.beside:
            return at_once(self._early(batch))
        calls = [self._call(batch, indices) for indices in self._pieces(len(batch))]
        return self._output(calls, self.calls.run(calls, batch), batch)

    def _early(self, batch: RewardBatch) -> Early:
        pieces = self._pieces(len(batch))
        calls: dict[int, Call] = {}

        def work(number: int, indices) -> list[Callable[[], Any]]:
            calls[number] = self._call(batch, indices)
            return [self.calls.work(calls[number], batch)]

        def join(flight: Flight) -> RewardOutput:
            found = flight.results(lambda place, made: self.failures.count(made, pieces[place[0]], batch))
            outcomes = [outcome for made in found for outcome in made]
            return self._output([calls[number] for number in range(len(pieces))], outcomes, batch)

        return EarlyPieces(batch, pieces, self.calls.flight(len(pieces)), work, join)


def merged(calls: list[Call], count: int) -> tuple[dict[str, list[float]], dict[str, list]]:
    """What the calls of a batch of `count` completions logged: metrics, and columns with "" where a call had none."""
    columns: dict[str, list] = {}
    for call in calls:
        for name, values in call.log.columns.items():
            if len(values) != len(call.indices):
                raise RewardError(f"log_extra({name!r}, ...): {len(values)} values for {len(call.indices)} completions")
            column = columns.setdefault(name, [""] * count)
            for index, value in zip(call.indices, values, strict=True):
                column[index] = value
    return joined(call.log.metrics for call in calls), columns
