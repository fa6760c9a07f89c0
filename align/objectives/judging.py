"""From judged pairs to scores: how often each completion of a prompt is preferred to the prompt's others."""

from collections.abc import Iterable

import torch
from torch import Tensor


def members_of(groups: list[int]) -> dict[int, list[int]]:
    """The indices of each group. groups: one number per completion, [N]."""
    members: dict[int, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    return members


def pairs_within(groups: list[int]) -> tuple[list[int], list[int]]:
    """All pairs (i < j) of the same group, as two lists of M indices. groups: one number per completion, [N]."""
    found = [(i, j) for own in members_of(groups).values() for place, i in enumerate(own) for j in own[place + 1 :]]
    return [i for i, _ in found], [j for _, j in found]


def win_rates(first: Iterable[int], second: Iterable[int], preference: Tensor, count: int) -> Tensor:
    """The mean preference of each completion over those it was judged against, [count] in [0, 1].

        s_i = 1/n_i sum_j P(i > j),   P(j > i) = 1 - P(i > j)

    the empirical form of P(y > pi) = E_{y' ~ pi} P(y > y'), the reward of SPO (Swamy et al. 2024, arXiv 2401.04056) and
    what INPO's closed form holds (Zhang et al. 2024, arXiv 2407.00617).

    first, second: indices of the pairs, [M]. preference: P(first > second), [M] in [0, 1], NaN for a pair without a
    verdict, which counts for neither. NaN where no pair has one.
    """
    left, right = (torch.as_tensor(list(side), dtype=torch.long) for side in (first, second))
    known = ~preference.isnan()
    won = torch.zeros(count, dtype=torch.float64)
    judged = torch.zeros(count, dtype=torch.float64)
    values = preference.double()[known]
    for side, value in ((left, values), (right, 1 - values)):
        won.index_add_(0, side[known], value)
        judged.index_add_(0, side[known], torch.ones_like(value))
    return (won / judged).float()  # 0/0 is NaN
