"""Constrained RLHF (Moskovitz et al. 2023, arXiv 2310.04373): thresholds on rewards, advantages mixed by multipliers.

Maximise a task reward r_0 subject to v_i >= theta_i, v_i <= theta_i or v_i = theta_i, v_i the expected reward i. In the
paper's mu-PPO and xi-PPO the task is the negative KL to the reference and every reward model is a constraint.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from align.errors import ConfigError
from align.objectives.shapes import check_same

DIRECTIONS = ("at_least", "at_most", "equal")
FORMS = ("sigmoid", "tanh", "softplus")


@dataclass(frozen=True)
class Constraint:
    """reward: the name of a reward column. threshold: theta, in that reward's unit."""

    reward: str
    direction: Literal["at_least", "at_most", "equal"]
    threshold: float

    def __post_init__(self):
        if self.direction not in DIRECTIONS:
            raise ConfigError(f"constraint on {self.reward!r}: {self.direction!r} is none of {', '.join(DIRECTIONS)}")
        if not math.isfinite(self.threshold):
            raise ConfigError(f"constraint on {self.reward!r}: the threshold is {self.threshold}, not a finite number")

    def slack(self, value: float) -> float:
        """v - theta (at_most: theta - v): negative where it is violated; for `equal`, the side that v is on."""
        return self.threshold - value if self.direction == "at_most" else value - self.threshold

    def violation(self, value: float) -> float:
        """How far v is on the wrong side, 0 where the constraint holds."""
        return abs(self.slack(value)) if self.direction == "equal" else max(0.0, -self.slack(value))


def check_together(constraints: Sequence[Constraint]) -> None:
    """ConfigError for constraints that say the same thing twice, or that no value can meet."""
    kinds = [f"{c.reward} {c.direction}" for c in constraints]
    double = sorted({kind for kind in kinds if kinds.count(kind) > 1})
    if double:
        raise ConfigError(f"a reward is constrained twice in the same direction: {', '.join(double)}")
    ceilings = {c.reward: c.threshold for c in constraints if c.direction == "at_most"}
    for c in constraints:
        if c.direction == "at_least" and c.threshold > ceilings.get(c.reward, math.inf):
            raise ConfigError(
                f"no value of {c.reward} is at least {c.threshold:g} and at most {ceilings[c.reward]:g}: in a band "
                "at_least has the lower threshold"
            )


def squash(raw: Tensor, form: str) -> Tensor:
    """The multiplier of a raw value: sigmoid in (0, 1), tanh in (-1, 1), softplus above 0."""
    if form not in FORMS:
        raise ConfigError(f"multiplier form must be one of {', '.join(FORMS)}, got {form!r}")
    if form == "softplus":
        return torch.nn.functional.softplus(raw)
    return torch.sigmoid(raw) if form == "sigmoid" else torch.tanh(raw)


def squash_slope(raw: Tensor, form: str) -> Tensor:
    """Derivative of `squash` at a raw value."""
    s = squash(raw, form)
    return {"sigmoid": lambda: s * (1 - s), "tanh": lambda: 1 - s * s, "softplus": lambda: torch.sigmoid(raw)}[form]()


def applied_weights(raw: Tensor, form: str, constraints: Sequence[Constraint]) -> tuple[Tensor, Tensor]:
    """The weights of the task advantage (a scalar) and of the constraints' [N] in the mixed advantage (eq. 4.4).

        sigmoid, tanh:   A = (N - sum_i s_i) A_task + sum_i +-s_i A_i       the weights of the paper, summing to N
        softplus:        A = (A_task + sum_i +-s_i A_i) / (1 + sum_i s_i)   the Lagrangian, scaled to stay bounded

    - for at_most. raw: [N].
    """
    s = squash(raw, form)
    signs = torch.tensor([-1.0 if c.direction == "at_most" else 1.0 for c in constraints], dtype=raw.dtype)
    if form == "softplus":
        return 1 / (1 + s.sum()), signs * s / (1 + s.sum())
    return len(constraints) - s.sum(), signs * s


def constraint_value(scores: Tensor, lengths: Tensor, estimator: Literal["episode_mean", "token_mean"]) -> float:
    """The estimate of v_i that is compared with theta_i. scores: [B], of whole episodes; lengths: [B], response tokens.

    episode_mean is the mean score. token_mean is what the released code computes, the mean over tokens of the
    undiscounted reward-to-go: with a reward on the last token that weighs every episode by its length.
    """
    check_same(1, scores=scores, lengths=lengths)
    if estimator == "episode_mean":
        return scores.mean().item()
    if estimator == "token_mean":
        return ((scores * lengths).sum() / lengths.sum()).item()
    raise ConfigError(f"estimator must be episode_mean or token_mean, got {estimator!r}")


def sat_weights(values: Tensor, thresholds: Tensor, coefficients: Tensor) -> Tensor:
    """PPO-SAT on the batch mean: weights [N] of the reward columns, the gradient of -sum_i a_i (v_i - theta_i)^2.

    -2 a_i (v_i - theta_i), with v_i the mean reward of the batch. `sat_reward_released` penalises each episode instead.
    """
    check_same(1, values=values, thresholds=thresholds, coefficients=coefficients)
    return -2 * coefficients * (values - thresholds)


def sat_reward_released(rewards: Tensor, thresholds: Tensor, coefficients: Tensor) -> Tensor:
    """PPO-SAT as released: -sum_i (a_i r_i - theta_i)^2 of each episode, [B]. rewards: [B, N].

    Pitfall: for a reward of 0 or 1 the expectation is linear in p = E[r] with slope 2 theta - 1, so it pushes p to 0
    (theta < 0.5) or to 1, never to theta.
    """
    check_same(1, one_row_of_rewards=rewards[0], thresholds=thresholds, coefficients=coefficients)
    return -(coefficients * rewards - thresholds).square().sum(-1)
