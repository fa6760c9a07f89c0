"""Aggregation of the scores of several reward models (Coste et al. 2023, "Reward Model Ensembles Help Mitigate
Overoptimization", arXiv 2310.02743, section 3.2)."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from align.errors import RewardError

Rule = str | Callable[[Tensor], Tensor]
"""A name of RULES, or a function of the members' scores [K, B] that returns one score per completion [B]."""
RULES = ("mean", "wco", "uwo", "lcb", "quantile")
NAMED = "mean, wco (the worst case), uwo (uncertainty-weighted), lcb, quantile"
WEIGHTED = {"uwo": "the variance (the paper used 0.5 and 0.1)", "lcb": "the standard deviation"}


@dataclass
class Aggregate:
    """scores: the aggregated reward [B]. mean, variance: over the members [B], the variance with the ddof asked for
    and None for a single member, which has none."""

    scores: Tensor
    mean: Tensor
    variance: Tensor | None


def check_rule(rule: Rule, members: int, lambda_: float | None, ddof: int, quantile: float | None = None) -> None:
    """Raise `RewardError` for a rule that does not exist, that cannot be computed with this many members, that lacks
    its parameter, or that has none of the parameters given."""
    if callable(rule):
        _check_arguments(rule)
        rule = rule_name(rule)
    elif rule not in RULES:
        raise RewardError(
            f"unknown aggregation {rule!r}: one of {NAMED}, or a function of yours, path/file.py:function"
        )
    if members < 1:
        raise RewardError("an ensemble needs at least one member")
    if ddof not in (0, 1):
        raise RewardError(f"ddof must be 0 (population variance, the paper's) or 1 (unbiased), got {ddof!r}")
    if rule in WEIGHTED:
        if lambda_ is None:
            raise RewardError(f"aggregation {rule} needs lambda, the weight of {WEIGHTED[rule]}")
        if not 0 <= lambda_ < math.inf:
            raise RewardError(f"lambda must be >= 0 and finite (it is subtracted times the spread), got {lambda_}")
        if members == 1:
            raise RewardError(f"aggregation {rule} needs at least two members: one member has no variance")
    elif lambda_ is not None:
        raise RewardError(f"lambda belongs to uwo and lcb; {rule} has none, so {lambda_} would be ignored")
    if rule == "quantile":
        if quantile is None or not 0 <= quantile <= 1:
            raise RewardError(f"aggregation quantile needs quantile, a number in [0, 1], got {quantile}")
    elif quantile is not None:
        raise RewardError(f"quantile belongs to aggregation quantile; {rule} has none, so {quantile} would be ignored")
    if ddof >= members:
        raise RewardError(f"the variance with ddof={ddof} needs more than {members} member(s)")


def _check_arguments(rule: Callable[[Tensor], Tensor]) -> None:
    try:
        signature = inspect.signature(rule)
    except (TypeError, ValueError):  # of some that are built in
        return
    try:
        signature.bind(None)
    except TypeError as error:
        raise RewardError(
            f"aggregation {rule_name(rule)} must take one argument, the members' scores [members, completions]: {error}"
        ) from error


def rule_name(rule: Rule) -> str:
    """Of a rule, for messages."""
    return rule if isinstance(rule, str) else f"by {getattr(rule, '__name__', type(rule).__name__)}"


def aggregate(
    scores: Tensor, rule: Rule, *, lambda_: float | None = None, ddof: int = 0, quantile: float | None = None
) -> Aggregate:
    """Aggregate member scores [K, B] into one score per completion [B].

        mean      R = (1/K) sum_i R_i
        wco       R = min_i R_i                             (worst case)
        uwo       R = mean_i R_i - lambda * var_i R_i       (uncertainty-weighted; *variance*, not deviation: eq. 5)
        lcb       R = mean_i R_i - lambda * sqrt(var_i R_i) (lower confidence bound)
        quantile  R = the quantile of R_1 .. R_K, interpolated linearly between members; 0 is wco, 0.5 the median
        function  R = rule(scores), of your own: [K, B] -> [B]

    lambda has the unit 1/reward with uwo and none with lcb. Members must be on one scale first. ddof=0 is the paper's
    population variance; their released PPO code used ddof=1, which for K members equals lambda * K/(K-1) here (lcb:
    lambda * sqrt(K/(K-1))). lambda=0 is the mean. ddof also applies to the variance that is returned with every rule.
    """
    if scores.dim() != 2:
        raise RewardError(f"member scores must be [members, completions], got shape {tuple(scores.shape)}")
    check_rule(rule, scores.shape[0], lambda_, ddof, quantile)
    mean = scores.mean(0)
    variance = torch.var(scores, dim=0, correction=ddof) if scores.shape[0] > 1 else None
    if callable(rule):
        combined = rule(scores.clone())  # which it may change in place: the members' are logged
        if not isinstance(combined, Tensor) or combined.shape != scores.shape[1:]:
            got = list(combined.shape) if isinstance(combined, Tensor) else type(combined).__name__
            raise RewardError(
                f"aggregation {rule_name(rule)}: from the scores {list(scores.shape)} it must return one "
                f"per completion, a tensor of shape [{scores.shape[1]}], got {got}"
            )
    elif rule == "mean":
        combined = mean
    elif rule == "wco":
        combined = scores.amin(0)
    elif rule == "quantile":
        combined = torch.quantile(scores, cast(float, quantile), dim=0)
    else:
        spread = cast(Tensor, variance) if rule == "uwo" else cast(Tensor, variance).sqrt()
        combined = mean - cast(float, lambda_) * spread  # `check_rule` has seen lambda and two members
    return Aggregate(combined, mean, variance)
