"""The sections `constraints`, `multipliers`, `dynamic_weights`, `threshold_search` and `stop_at` as typed options.

What one section says by itself is checked here; what sections and other options say together, in `options`, `dynamic`
and `search` beside this file. Nothing here imports torch.
"""

import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from align.config.sections import Kinds, Section, parse, parse_list
from align.lazy import imported


class ConstraintSection(Section):
    """One reward that is held at a threshold."""

    label = "a constraint"
    reward: str = Field(description="Name of the reward.")
    direction: Literal["at_least", "at_most", "equal"] = Field(description="at_least, at_most or equal.")
    threshold: float | None = Field(
        None, description="In the reward's unit; needed, but with threshold_search, which finds it."
    )


class PIDSection(Section):
    """Gains of a PID controller instead of gradient descent."""

    kp: float = Field(1.0, ge=0)
    ki: float = Field(0.1, ge=0)
    kd: float = Field(0.0, ge=0)
    integral_bound: float = Field(10.0, gt=0)


class Updates(Section):
    """What the multipliers and the penalty on the batch have in common."""

    update_per: Literal["rollout", "mini_batch"] = Field("rollout", description="When they are updated.")
    estimator: Literal["episode_mean", "token_mean"] = Field(
        "episode_mean", description="Mean over completions, or over tokens (long completions count more)."
    )
    standardize: bool = Field(False, description="Give each stream's advantages mean 0 and deviation 1.")
    kl_in_constraints: bool = Field(False, description="The KL is inside the constrained streams too.")


class LagrangianSection(Updates):
    """Lagrange multipliers: `align.objectives.multipliers.Multipliers`, whose defaults these are."""

    label = "form sigmoid, tanh or softplus"
    form: Literal["sigmoid", "tanh", "softplus"] | None = Field(
        None, description="Default: tanh where all constraints are equal, else sigmoid."
    )
    learning_rate: float = Field(0.1, ge=0, description="Of plain gradient descent.")
    momentum: float = Field(0.1, ge=0, lt=1)
    max_grad_norm: float | None = Field(0.5, gt=0, description="Of all multipliers together.")
    initial: float | list[float] = Field(0.0, description="Raw value to start from, one or one per constraint.")
    bounds: list[float] | None = Field(None, description="Smallest and largest raw value. Default: by form.")
    warmup: int = Field(0, ge=0, description="Updates in which they are measured and not moved.")
    task_apart: bool = Field(
        False, description="Each reward of the task in a stream of its own with the KL, as in the released All-PPO."
    )
    pid: PIDSection | None = Field(None, description="kp, ki, kd, integral_bound: a PID controller sets the raw value.")

    @model_validator(mode="after")
    def _pid_alone(self):
        descent = ("learning_rate", "momentum", "max_grad_norm", "initial")
        ignored = [name for name in descent if name in self.model_fields_set]
        if self.pid is not None and ignored:
            raise ValueError(f"{', '.join(ignored)} would be ignored beside pid, which sets the raw value")
        if self.bounds is not None and (len(self.bounds) != 2 or not self.bounds[0] < self.bounds[1]):
            raise ValueError(f"bounds must be [smallest, largest] raw value, got {self.bounds}")
        return self


class SquaredSection(Updates):
    """Squared distance of the batch's mean to the threshold (PPO-SAT)."""

    label = "form squared"
    form: Literal["squared"]
    coefficients: float | list[float] = Field(1.0, description="Above 0, one or one per constraint.")


class SquaredPerEpisodeSection(Section):
    """Squared distance of each completion to the threshold (PPO-SAT as released)."""

    label = "form squared_per_episode"
    form: Literal["squared_per_episode"]
    coefficients: float | list[float] = Field(1.0, description="Above 0, one or one per constraint.")


class HypervolumeSection(Section):
    """All rewards times one number, the larger the more the last evaluation added to the dominated volume."""

    label = "type hypervolume"
    type: Literal["hypervolume"]


class GradientSection(Section):
    """A weight per reward, from the agreement of the rewards' policy gradients."""

    label = "type gradient"
    type: Literal["gradient"]
    learning_rate: float = Field(1e-6, gt=0, description="Only its ratio to mu counts.")
    mu: float = Field(1e-5, gt=0)
    parameters: str = Field("", description="A regular expression: gradients are taken of parameters with such a name.")

    @field_validator("parameters")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"{value!r} is no regular expression: {error}") from error
        return value


class SearchSection(Section):
    """Nelder-Mead on the gold score, within the run, over the thresholds of `equal` constraints."""

    start: dict[str, float] = Field(description="By reward: its value at the start.")
    reached: dict[str, float] = Field(description="By reward: the largest value seen in runs of one reward each.")
    budget: int = Field(ge=1, description="Stretches of training, at most.")
    steps: int = Field(ge=1, description="Optimiser steps of a stretch, at most.")
    tolerance: float = Field(0.05, gt=0, description="Share of a threshold: so close, a stretch ends.")
    restore: bool = Field(False, description="Every stretch starts from the first policy again.")
    convergence: float = Field(0.01, gt=0, description="Spread of the simplex at which the search ends.")
    cache: float | None = Field(
        0.05, ge=0, description="Share of the distance from start to reached within which a score is taken again."
    )


class GoldPeakSection(Section):
    """Stop when the gold score has fallen from its peak, by the rule of the reports' verdicts."""

    patience: int = Field(3, ge=1, description="Evaluations in a row at which it has fallen by more than chance.")


class DisagreementSection(Section):
    """Stop when the members of an ensemble disagree too much about the policy's completions."""

    limit: float = Field(
        gt=0, description="Of the standard deviation of the members' scores, in their unit, mean over the prompts."
    )
    patience: int = Field(1, ge=1, description="Evaluations in a row above the limit by more than chance.")
    reward: str | None = Field(None, description="Name of the ensemble. Default: the one there is.")


class StopSection(Section):
    """When a run ends before its last step."""

    gold_peak: GoldPeakSection | None = Field(None, description="patience: when the gold score fell from its peak.")
    disagreement: DisagreementSection | None = Field(
        None, description="limit, patience, reward: when an ensemble's members disagree more than that."
    )

    @model_validator(mode="after")
    def _something(self):
        if self.gold_peak is None and self.disagreement is None:
            raise ValueError("name what to stop at: gold_peak or disagreement")
        return self


MULTIPLIERS = Kinds(
    "multipliers",
    {
        **dict.fromkeys(("sigmoid", "tanh", "softplus"), LagrangianSection),
        "squared": SquaredSection,
        "squared_per_episode": SquaredPerEpisodeSection,
    },
    by="form",
    default=LagrangianSection,
)
DYNAMIC_WEIGHTS = Kinds("dynamic_weights", {"hypervolume": HypervolumeSection, "gradient": GradientSection})


def parse_dynamic_weights(value: Any, key: str) -> Section:
    """The section; `type: "file.py:Class"` is a weighting of the user's, which is imported."""
    kind = value.get("type") if isinstance(value, Mapping) else None
    if isinstance(kind, str) and ":" in kind and kind not in DYNAMIC_WEIGHTS.kinds:
        from align.trainers.weighting.base import register_weighting

        register_weighting(kind, imported(kind, "weighting"))
    return DYNAMIC_WEIGHTS.parse(value, key)


def parse_constraints(values: Any, key: str) -> list[ConstraintSection]:
    return parse_list(lambda value, place: parse(ConstraintSection, value, place), values, key)


def parse_search(value: Any, key: str) -> SearchSection:
    return parse(SearchSection, value, key)


def parse_stop(value: Any, key: str) -> StopSection:
    return parse(StopSection, value, key)
