"""The kinds of rewards that call a function."""

from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field

from align.reward_models.kinds import Count, RewardSpec, register_reward

WEEK = 604_800  # seconds


class Fallible(RewardSpec):
    """Options of what becomes of a completion whose reward fails (`align.reward_models.failures`)."""

    on_error: Literal["stop", "mask", "score"] = Field(
        "stop", description="What fails ends the run, is left out of loss and baselines, or gets error_score."
    )
    error_score: float | None = Field(None, allow_inf_nan=False, description="The score of what failed.")
    max_error_share: float | None = Field(
        None, gt=0, le=1, description="Of the last 1,000 completions; more failures end the run [0.1]."
    )


class OfFunction(Fallible):
    """Options of a reward that calls a function."""

    function: str | Callable = Field(description="package.module:name or path/file.py:name.")
    name: str | None = Field(None, description="In metrics. Default: the function's name.")
    arguments: dict[str, Any] | None = Field(None, description="Further keyword arguments of every call.")
    concurrency: Count | None = Field(
        None, description="Of an async function, calls in flight at most [16]; of a plain one, threads."
    )

    timeout: float = Field(600.0, gt=0, le=WEEK, description="Seconds that a call may take.")

    @property
    def stated_name(self) -> str:
        source = self.function if isinstance(self.function, str) else self.function.__name__
        return self.name or source.rpartition(":")[2].rpartition(".")[2]

    def check(self) -> None:
        self.build()


@register_reward("rule")
class RuleSpec(OfFunction):
    """A Python function of the whole batch, plain or async."""

    batch_size: Count | None = Field(None, description="Completions per call. Default: one call.")

    def build(self, tokenizer=None, device=None):
        from align.reward_models.rules import RuleReward

        return RuleReward(**self.options())


@register_reward("verifier")
class VerifierSpec(OfFunction):
    """Stated scores for passed, failed and undecided, one completion at a time."""

    on_pass: float = Field(1.0, description="The score of True.")
    on_fail: float = Field(0.0, description="The score of False.")
    on_none: float | None = Field(None, description="The score of None, which is an error without it.")

    def build(self, tokenizer=None, device=None):
        from align.reward_models.verifier import VerifierReward

        return VerifierReward(**self.options())
