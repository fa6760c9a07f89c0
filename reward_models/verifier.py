"""Rewards that check a completion: passed, failed, or not to be decided."""

import math
from collections.abc import Callable
from typing import Any

import torch

from align.errors import ConfigError, RewardError
from align.reward_models.base import RewardBatch, RewardOutput
from align.reward_models.calls import TIMEOUT, Call, CalledReward, Calls, merged, plain
from align.reward_models.failures import Failed, Failures
from align.reward_models.functions import UserFunction


class VerifierReward(CalledReward):
    """A function called once per completion that returns True, False or None, each with a stated score.

    Of `prompt`, `completion`, `prompt_ids`, `completion_ids` and the dataset's columns it gets those among its
    parameters, and `trainer_state` and `log_metric` if it names them. Async functions are awaited together. A function
    that raises is an error that names the row, or what `on_error` says: a broken check is no failed check.
    `align.reward_models.checkers` has some.

    Args:
        function: the function, or where it is: "package.module:name" or "path/file.py:name".
        name: in metrics and errors; by default the function's name.
        on_pass, on_fail: scores of True and False. on_none: of None; without it None is an error, as `on_error` has it.
        arguments: further keyword arguments, the same in every call. columns: {parameter: column of the dataset} where
            the names differ.
        concurrency: of an async function, calls in flight at most (16); of a plain one, threads (none).
        timeout: seconds of a call (600). on_error, error_score, max_error_share: `Failures`.
    """

    def __init__(
        self,
        function: str | Callable,
        *,
        name: str | None = None,
        on_pass: float = 1.0,
        on_fail: float = 0.0,
        on_none: float | None = None,
        arguments: dict[str, Any] | None = None,
        columns: dict[str, str] | None = None,
        concurrency: int | None = None,
        timeout: float = TIMEOUT,
        on_error: str = "stop",
        error_score: float | None = None,
        max_error_share: float | None = None,
    ):
        self.function = UserFunction(function, arguments)
        self.name = name or self.function.name
        self.columns = dict(columns or {})
        self.values = {True: on_pass, False: on_fail, None: on_none}
        for key, value in (("on_pass", on_pass), ("on_fail", on_fail), ("on_none", on_none)):
            if value is not None and not (isinstance(value, (int, float)) and math.isfinite(value)):
                raise ConfigError(f"reward {self.name!r}: {key} must be a finite number, got {value!r}")
        self.failures = Failures(self.name, on_error, error_score, max_error_share)
        self.calls = Calls(self.function, self.failures, self._read, self._blame, concurrency, timeout)

    def _pieces(self, count: int) -> list[range]:
        return [range(row, row + 1) for row in range(count)]

    def _output(self, calls: list[Call], outcomes: list, batch: RewardBatch) -> RewardOutput:
        undecided = [row for row, outcome in enumerate(outcomes) if outcome is None]
        if undecided and self.values[None] is None:
            raise RewardError(
                f"reward {self.name!r}: {self.function.source} could not decide (None) for "
                f"{batch.row_names(undecided)}, and has no score for that: set on_none, or fix the rows"
            )
        values: dict = self.values
        output = self.failures.output([o if isinstance(o, Failed) else values[o] for o in outcomes])
        if self.values[None] is not None:
            output.extras["undecided"] = torch.tensor([float(outcome is None) for outcome in outcomes])
        output.given, _ = merged(calls, len(batch))
        return output

    def _call(self, batch: RewardBatch, indices: range) -> Call:
        (row,) = indices
        call = Call([row], {})
        available = {name: values[row] for name, values in batch.columns.items()}
        available |= {"prompt": batch.prompts[row], "completion": batch.completions[row]}
        available |= {name: self._value(column, row, batch) for name, column in self.columns.items()}
        if batch.prompt_ids is not None:
            available["prompt_ids"] = batch.prompt_ids[row]
        if batch.completion_ids is not None:
            available["completion_ids"] = batch.completion_ids[row]
        run = {"log_metric": call.log.log_metric}
        run |= {} if batch.trainer_state is None else {"trainer_state": batch.trainer_state}
        call.arguments = self.function.select(available, self.name, run)
        return call

    def _value(self, column: str, row: int, batch: RewardBatch) -> Any:
        """Of a column, or of an entry of one that holds mappings: `reward_model.ground_truth`."""
        first, *names = [column] if column in batch.columns else column.split(".")
        if first not in batch.columns:
            raise RewardError(
                f"reward {self.name!r}: the dataset has no column {first} (it has "
                f"{', '.join(sorted(batch.columns)) or 'none'})"
            )
        value = batch.columns[first][row]
        for name in names:
            if not isinstance(value, dict) or name not in value:
                held = f"the names {', '.join(value)}" if isinstance(value, dict) else type(value).__name__
                raise RewardError(
                    f"reward {self.name!r}: {batch.row_name(row)} has no {column}: there is no {name} in {held}"
                )
            value = value[name]
        return value

    def _blame(self, error: Exception, call: Call, batch: RewardBatch) -> Exception:
        if isinstance(error, RewardError):
            return error
        (row,) = call.indices
        return RewardError(
            f"reward {self.name!r}: {self.function.source} failed on {batch.row_name(row)} with "
            f"{type(error).__name__}: {error}. Fix the function or the row; what cannot be checked is None. The "
            f"completion: {str(batch.completions[row])[:200]!r}"
        )

    def _read(self, outcome: Any, call: Call, batch: RewardBatch) -> list[bool | None | Failed]:
        outcome = plain(outcome)
        if outcome is None and self.values[None] is None and not self.failures.stops:
            return [Failed(f"{self.function.source} could not decide (None)")]
        if outcome is None or isinstance(outcome, bool):
            return [outcome]
        raise RewardError(
            f"reward {self.name!r}: {self.function.source} returned {outcome!r:.80} for "
            f"{batch.row_name(call.indices[0])}; a verifier returns True, False or None (a function that returns "
            "numbers is a reward of type rule)"
        )
