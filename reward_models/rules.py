"""Rewards that are Python functions."""

import functools
import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch

from align.errors import ConfigError, RewardError
from align.reward_models.base import Reward, RewardBatch, RewardOutput
from align.reward_models.functions import UserFunction, check_concurrency, run_concurrently


class RuleReward(Reward):
    """A function called with the keyword arguments that it names.

    Of `prompts`, `completions`, `prompt_ids`, `completion_ids` and the dataset's columns it gets those among its
    parameters (all of them if it takes `**kwargs`), each a list with one entry per completion, and it returns one
    number per completion. Functions written as TRL reward functions work as they are, async ones too.

    Args:
        function: the function, or where it is: "package.module:name" or "path/file.py:name".
        name: in metrics and errors; by default the function's name.
        arguments: further keyword arguments, the same in every call.
        batch_size: of an async function: completions per call, the calls being awaited together. Default: one call, as
            a function may compare the completions it is given.
        concurrency: of an async function: calls in flight at most (16).
    """

    def __init__(
        self,
        function: str | Callable,
        *,
        name: str | None = None,
        arguments: dict[str, Any] | None = None,
        batch_size: int | None = None,
        concurrency: int | None = None,
    ):
        self.function = UserFunction(function, arguments)
        self.name = name or self.function.name
        self.concurrency = check_concurrency(self.function, concurrency, batch_size=batch_size)
        if batch_size is not None and batch_size < 1:
            raise ConfigError(f"reward {self.name!r}: batch_size must be at least 1, got {batch_size}")
        self.batch_size = batch_size

    def _score(self, batch: RewardBatch) -> RewardOutput:
        if not self.function.is_async:
            return RewardOutput(torch.tensor(self._called(batch), dtype=torch.float32))
        size = self.batch_size or max(len(batch), 1)
        parts = [batch.select(range(start, min(start + size, len(batch)))) for start in range(0, len(batch), size)]
        scores = run_concurrently([functools.partial(self._awaited, part) for part in parts], self.concurrency)
        return RewardOutput(torch.tensor([score for part in scores for score in part], dtype=torch.float32))

    def _called(self, batch: RewardBatch) -> list[float]:
        given = self._given(batch)
        try:
            return self._checked(self.function.call(**given), batch)
        except Exception as error:
            self._note(error)
            raise

    async def _awaited(self, batch: RewardBatch) -> list[float]:
        given = self._given(batch)
        try:
            return self._checked(await self.function.call(**given), batch)
        except Exception as error:
            self._note(error)
            raise

    def _given(self, batch: RewardBatch) -> dict[str, list]:
        available = {**batch.columns, "prompts": batch.prompts, "completions": batch.completions}
        if batch.prompt_ids is not None:
            available["prompt_ids"] = batch.prompt_ids
        if batch.completion_ids is not None:
            available["completion_ids"] = batch.completion_ids
        return self.function.select(available, self.name)

    def _note(self, error: Exception) -> None:
        if not isinstance(error, RewardError):
            error.add_note(f"(raised by the reward function {self.function.source}, reward {self.name!r})")

    def _checked(self, scores: Any, batch: RewardBatch) -> list[float]:
        scores = scores.tolist() if hasattr(scores, "tolist") else scores
        if not isinstance(scores, (list, tuple)) or len(scores) != len(batch):
            what = f"{len(scores)} values" if isinstance(scores, (list, tuple)) else type(scores).__name__
            raise RewardError(
                f"reward {self.name!r}: {self.function.source} returned {what} for {len(batch)} completions"
            )
        bad = not_numbers(scores)
        if bad:
            raise RewardError(
                f"reward {self.name!r}: {self.function.source} returned {scores[bad[0]]!r} for {batch.row_names(bad)}; "
                "every completion needs a finite number"
            )
        return [float(score) for score in scores]


def not_numbers(scores: Sequence) -> list[int]:
    """The places of what is no finite number."""
    return [i for i, score in enumerate(scores) if not isinstance(score, Real) or not math.isfinite(score)]
