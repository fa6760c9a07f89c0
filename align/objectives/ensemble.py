"""Aggregation of the scores of several reward models (Coste et al. 2023, "Reward Model Ensembles Help Mitigate
Overoptimization", arXiv 2310.02743, section 3.2)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from align.errors import RewardError

RULES = ("mean", "wco", "uwo")


@dataclass
class Aggregate:
    """scores: the aggregated reward [B]. mean, variance: over the members [B], the variance with the ddof asked for."""

    scores: Tensor
    mean: Tensor
    variance: Tensor


def check_rule(rule: str, members: int, lambda_: float | None, ddof: int) -> None:
    """Raise `RewardError` for a rule that does not exist or cannot be computed with this many members."""
    if rule not in RULES:
        raise RewardError(f"unknown aggregation {rule!r}: one of {', '.join(RULES)}")
    if members < 1:
        raise RewardError("an ensemble needs at least one member")
    if ddof not in (0, 1):
        raise RewardError(f"ddof must be 0 (population variance, the paper's) or 1 (unbiased), got {ddof!r}")
    if rule == "uwo":
        if lambda_ is None:
            raise RewardError("aggregation uwo needs lambda, the weight of the variance (the paper used 0.5 and 0.1)")
        if lambda_ < 0:
            raise RewardError(f"lambda must be >= 0 (it is subtracted times the variance), got {lambda_}")
        if members == 1:
            raise RewardError("aggregation uwo needs at least two members: one member has no variance")
    elif lambda_ is not None:
        raise RewardError(f"lambda belongs to aggregation uwo; {rule} has none, so {lambda_} would be ignored")
    if ddof >= members:
        raise RewardError(f"the variance with ddof={ddof} needs more than {members} member(s)")


def aggregate(scores: Tensor, rule: str, *, lambda_: float | None = None, ddof: int = 0) -> Aggregate:
    """Aggregate member scores [K, B] into one score per completion [B].

        mean  R = (1/K) sum_i R_i
        wco   R = min_i R_i                                (worst case)
        uwo   R = mean_i R_i - lambda * var_i R_i          (uncertainty-weighted; *variance*, not deviation: eq. 5)

    lambda has the unit 1/reward, so members must be on one scale first. ddof=0 is the paper's population variance;
    their released PPO code used ddof=1, which for K members equals lambda * K/(K-1) here. lambda=0 is the mean.
    """
    if scores.dim() != 2:
        raise RewardError(f"member scores must be [members, completions], got shape {tuple(scores.shape)}")
    check_rule(rule, scores.shape[0], lambda_, ddof)
    mean = scores.mean(0)
    variance = torch.var(scores, dim=0, correction=ddof)
    if rule == "mean":
        combined = mean
    elif rule == "wco":
        combined = scores.amin(0)
    else:
        combined = mean - lambda_ * variance
    return Aggregate(combined, mean, variance)
