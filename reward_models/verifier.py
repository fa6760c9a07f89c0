"""Rewards that check a completion: passed, failed, or not to be decided."""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from align.errors import ConfigError, RewardError
from align.reward_models.base import Reward, RewardBatch, RewardOutput
from align.reward_models.functions import UserFunction, check_concurrency, run_concurrently


class VerifierReward(Reward):
    """A function called once per completion that returns True, False or None, each with a stated score.

    Of `prompt`, `completion`, `prompt_ids`, `completion_ids` and the dataset's columns it gets those among its
    parameters. Async functions are awaited together. A function that raises is an error that names the row: a broken
    check is no failed check. `align.reward_models.checkers` has some.

    Args:
        function: the function, or where it is: "package.module:name" or "path/file.py:name".
        name: in metrics and errors; by default the function's name.
        on_pass, on_fail: scores of True and False. on_none: of None; without it None is an error.
        arguments: further keyword arguments, the same in every call.
        concurrency: of an async function: calls in flight at most (16).
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
        concurrency: int | None = None,
    ):
        self.function = UserFunction(function, arguments)
        self.name = name or self.function.name
        self.concurrency = check_concurrency(self.function, concurrency)
        self.values = {True: on_pass, False: on_fail, None: on_none}
        for key, value in (("on_pass", on_pass), ("on_fail", on_fail), ("on_none", on_none)):
            if value is not None and not (isinstance(value, (int, float)) and math.isfinite(value)):
                raise ConfigError(f"reward {self.name!r}: {key} must be a finite number, got {value!r}")

    def _score(self, batch: RewardBatch) -> RewardOutput:
        if self.function.is_async:
            calls = [functools.partial(self._awaited, batch, row) for row in range(len(batch))]
            outcomes = run_concurrently(calls, self.concurrency)
        else:
            outcomes = [self._called(batch, row) for row in range(len(batch))]
        undecided = [row for row, outcome in enumerate(outcomes) if outcome is None]
        if undecided and self.values[None] is None:
            raise RewardError(
                f"reward {self.name!r}: {self.function.source} could not decide (None) for "
                f"{batch.row_names(undecided)}, and has no score for that: set on_none, or mend the rows"
            )
        scores = torch.tensor([self.values[outcome] for outcome in outcomes], dtype=torch.float32)
        if self.values[None] is None:
            return RewardOutput(scores)
        return RewardOutput(scores, {"undecided": torch.tensor([float(o is None) for o in outcomes])})

    def _called(self, batch: RewardBatch, row: int) -> bool | None:
        given = self._given(batch, row)
        try:
            outcome = self.function.call(**given)
        except Exception as error:
            raise self._crash(batch, row, error) from error
        return self._checked(outcome, batch, row)

    async def _awaited(self, batch: RewardBatch, row: int) -> bool | None:
        given = self._given(batch, row)
        try:
            outcome = await self.function.call(**given)
        except Exception as error:
            raise self._crash(batch, row, error) from error
        return self._checked(outcome, batch, row)

    def _given(self, batch: RewardBatch, row: int) -> dict[str, Any]:
        available = {name: values[row] for name, values in batch.columns.items()}
        available |= {"prompt": batch.prompts[row], "completion": batch.completions[row]}
        if batch.prompt_ids is not None:
            available["prompt_ids"] = batch.prompt_ids[row]
        if batch.completion_ids is not None:
            available["completion_ids"] = batch.completion_ids[row]
        return self.function.select(available, self.name)

    def _crash(self, batch: RewardBatch, row: int, error: Exception) -> RewardError:
        return RewardError(
            f"reward {self.name!r}: {self.function.source} failed on {batch.row_name(row)} with "
            f"{type(error).__name__}: {error}. Mend the function or the row; what cannot be checked is None. The "
            f"completion: {str(batch.completions[row])[:200]!r}"
        )

    def _checked(self, outcome: Any, batch: RewardBatch, row: int) -> bool | None:
        if outcome is None or isinstance(outcome, (bool, np.bool_)):
            return None if outcome is None else bool(outcome)
        raise RewardError(
            f"reward {self.name!r}: {self.function.source} returned {outcome!r:.80} for {batch.row_name(row)}; a "
            "verifier returns True, False or None (a function that returns numbers is a reward of type rule)"
        )
