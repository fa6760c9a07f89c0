"""The kinds of rewards that call a function."""

from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field, model_validator

from align.errors import ConfigError
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
    columns: dict[str, str] | None = Field(None, description="Of the dataset, by parameter, where the names differ.")

    def build(self, tokenizer=None, device=None):
        from align.reward_models.verifier import VerifierReward

        return VerifierReward(**self.options())


class Check(Fallible):
    """Options of a ready verifier."""

    on_pass: float = Field(1.0, description="The score of a completion that passes.")
    on_fail: float = Field(0.0, description="The score of one that does not.")
    timeout: float = Field(600.0, gt=0, le=WEEK, description="Seconds that a check may take.")

    def check(self) -> None:
        self.build()

    def verifier(self, function: Callable, *without: str, **options):
        from align.reward_models.verifier import VerifierReward

        return VerifierReward(function, **{"name": self.stated_name, **self.options(*without), **options})


@register_reward("math")
class MathSpec(Check):
    """Answers that are equal as mathematics, by the package math-verify."""

    name: str = Field("math", description="In metrics.")
    column: str = Field("answer", description="Of the dataset, with the right answer.")
    seconds: float = Field(5.0, gt=0, description="Of processor time: what is not computed by then is not the answer.")
    concurrency: Count = Field(1, description="Child processes that compute at a time.")
    on_none: float | None = Field(
        None, description="The score where the right answer itself cannot be read, which is an error without it."
    )

    def build(self, tokenizer=None, device=None):
        from align.reward_models.checkers import math_answer
        from align.reward_models.math_check import check_installed

        check_installed()
        options: dict[str, Any] = {"columns": {"answer": self.column}, "arguments": {"seconds": self.seconds}}
        options["concurrency"] = self.concurrency if self.concurrency > 1 else None  # then in the main thread
        return self.verifier(math_answer, "column", "seconds", **options)


@register_reward("unit_tests")
class UnitTestsSpec(Check):
    """Code that passes asserts, or prints the right output, in a process of its own with limits."""

    name: str = Field("unit_tests", description="In metrics.")
    column: str = Field("tests", description="Of the dataset: asserts, or a list of {input, output}.")
    seconds: Count = Field(10, description="Of each program.")
    megabytes: Count = Field(1024, description="Of each program's memory.")
    concurrency: Count = Field(4, description="Programs at a time.")

    def build(self, tokenizer=None, device=None):
        from align.reward_models.checkers import python_tests

        limits = {"seconds": self.seconds, "megabytes": self.megabytes}
        options = {"columns": {"tests": self.column}, "arguments": limits, "concurrency": self.concurrency}
        return self.verifier(python_tests, "column", "seconds", "megabytes", **options)


@register_reward("format")
class FormatSpec(Check):
    """Completions in the form of a regular expression."""

    name: str = Field("format", description="In metrics.")
    pattern: str = Field(description="The regular expression; a dot stands for line breaks too.")
    anywhere: bool = Field(False, description="Whether a part of the completion is enough.")
    timeout: float = Field(10.0, gt=0, le=WEEK, description="Seconds that a check may take.")

    def build(self, tokenizer=None, device=None):
        import re

        from align.reward_models.checkers import format_match

        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ConfigError(f"reward {self.name!r}: pattern is no regular expression: {error}") from error
        arguments = {"pattern": self.pattern, "anywhere": self.anywhere}
        options = {"arguments": arguments, "timeout": self.timeout}
        return self.verifier(format_match, "pattern", "anywhere", **options)


@register_reward("length")
class LengthSpec(RewardSpec):
    """0 for lengths within bounds, falling to -1 outside."""

    name: str = Field("length", description="In metrics.")
    minimum: int = Field(0, ge=0, description="Least length.")
    maximum: Count | None = Field(None, description="Largest length. Default: no bound.")
    margin: int = Field(0, ge=0, description="Units over which the score falls to -1. 0: at once.")
    unit: Literal["tokens", "words", "characters"] = Field("tokens", description="What is counted.")

    @model_validator(mode="after")
    def _bounds(self):
        if self.maximum is not None and self.maximum < self.minimum:
            raise ValueError(f"maximum {self.maximum} is below minimum {self.minimum}")
        if self.maximum is None and not self.minimum:
            raise ValueError("give a minimum, a maximum or both")
        return self

    def build(self, tokenizer=None, device=None):
        from align.reward_models.checkers import length_scores
        from align.reward_models.rules import RuleReward

        bounds = {"minimum": self.minimum, "maximum": self.maximum, "margin": self.margin, "unit": self.unit}
        return RuleReward(length_scores, name=self.name, arguments=bounds)
