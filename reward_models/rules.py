"""Rewards that are Python functions."""

from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch

from align.errors import ConfigError, RewardError
from align.reward_models.base import RewardBatch, RewardOutput
from align.reward_models.calls import TIMEOUT, Call, CalledReward, Calls, merged, plain
from align.reward_models.failures import Failed, Failures
from align.reward_models.functions import UserFunction

LARGEST = torch.finfo(torch.float32).max


class RuleReward(CalledReward):
    """A function called with the keyword arguments that it names.

    Of `prompts`, `completions`, `prompt_ids`, `completion_ids` and the dataset's columns it gets those among its
    parameters (all of them if it takes `**kwargs`), each a list with one entry per completion, and it returns one
    number per completion, None where it does not apply. Functions written as TRL reward functions work as they are,
    async ones too; `trainer_state`, `environments`, `log_extra` and `log_metric` are among the arguments.

    Args:
        function: the function, or where it is: "package.module:name" or "path/file.py:name".
        name: in metrics and errors; by default the function's name.
        arguments: further keyword arguments, the same in every call.
        batch_size: completions per call. Default: one call, as a function may compare the completions it is given.
        concurrency: of an async function, calls in flight at most (16); of a plain one, threads (none). It needs
            batch_size.
        timeout: seconds of a call (600). on_error, error_score, max_error_share: `Failures`.
    """

    def __init__(
        self,
        function: str | Callable,
        *,
        name: str | None = None,
        arguments: dict[str, Any] | None = None,
        batch_size: int | None = None,
        concurrency: int | None = None,
        timeout: float = TIMEOUT,
        on_error: str = "stop",
        error_score: float | None = None,
        max_error_share: float | None = None,
    ):
        self.function = UserFunction(function, arguments)
        self.name = name or self.function.name
        if batch_size is not None and batch_size < 1:
            raise ConfigError(f"reward {self.name!r}: batch_size must be at least 1, got {batch_size}")
        if concurrency is not None and batch_size is None:
            raise ConfigError(f"reward {self.name!r}: concurrency does nothing without batch_size: there is one call")
        self.batch_size = batch_size
        self.failures = Failures(self.name, on_error, error_score, max_error_share)
        self.calls = Calls(self.function, self.failures, self._read, self._blame, concurrency, timeout)

    def _pieces(self, count: int) -> list[range]:
        size = self.batch_size or max(count, 1)
        return [range(start, min(start + size, count)) for start in range(0, count, size)]

    def _output(self, calls: list[Call], outcomes: list, batch: RewardBatch) -> RewardOutput:
        output = self.failures.output(outcomes)
        output.given, output.columns = merged(calls, len(batch))
        return output

    def _call(self, batch: RewardBatch, indices: range) -> Call:
        part = batch.select(indices) if len(indices) < len(batch) else batch
        call = Call(indices, {})
        available = {**part.columns, "prompts": part.prompts, "completions": part.completions}
        if part.prompt_ids is not None:
            available["prompt_ids"] = part.prompt_ids
        if part.completion_ids is not None:
            available["completion_ids"] = part.completion_ids
        run: dict[str, Any] = {"log_metric": call.log.log_metric, "log_extra": call.log.log_extra}
        run |= {} if part.environments is None else {"environments": part.environments}
        run |= {} if part.trainer_state is None else {"trainer_state": part.trainer_state}
        call.arguments = self.function.select(available, self.name, run)
        return call

    def _blame(self, error: Exception, call: Call, batch: RewardBatch) -> Exception:
        if not isinstance(error, RewardError):
            error.add_note(f"(raised by the reward function {self.function.source}, reward {self.name!r})")
        return error

    def _read(self, scores: Any, call: Call, batch: RewardBatch) -> list[float | None | Failed]:
        scores, count = scores.tolist() if hasattr(scores, "tolist") else scores, len(call.indices)
        if isinstance(scores, (list, tuple)):
            scores = [plain(score) for score in scores]
        if not isinstance(scores, (list, tuple)) or len(scores) != count:
            what = f"{len(scores)} values" if isinstance(scores, (list, tuple)) else type(scores).__name__
            raise RewardError(
                f"reward {self.name!r}: {self.function.source} returned {what} for {count} completions: return a list "
                "with one score for each, in their order"
            )
        bad = set(not_numbers([0.0 if score is None else score for score in scores]))
        if bad and self.failures.stops:
            first = min(bad)
            raise RewardError(
                f"reward {self.name!r}: {self.function.source} returned {scores[first]!r:.80} for "
                f"{batch.row_names([call.indices[i] for i in sorted(bad)])}; every completion needs a finite number, "
                "or None where the reward does not apply"
            )
        return [
            Failed(f"{self.function.source} returned {score!r:.80}")
            if i in bad
            else None
            if score is None
            else float(score)
            for i, score in enumerate(scores)
        ]


def not_numbers(scores: Sequence) -> list[int]:
    """The indices of what is no finite number that a float32 can hold."""
    return [i for i, score in enumerate(scores) if not _is_number(score)]


def _is_number(score: object) -> bool:
    # not by float(score), which raises for an int that is too large
    return isinstance(score, Real) and score <= LARGEST and not score < -LARGEST
