"""Dynamic weights of several rewards (arXiv 2509.11452): guided by the hypervolume, or by the gradients.

Formulas of the authors' code (yining610/dynamic-reward-weighting, 238fe65).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from align.objectives.shapes import check_per_row


def hypervolume(points: Sequence[Sequence[float]], reference: Sequence[float]) -> float:
    """Volume that the points dominate above the reference, all objectives maximised. points: n of d numbers.

    Exact, by slices along the last objective: each slice is the (d-1)-dimensional volume of the points that reach it.
    Points that are below the reference in an objective dominate nothing. Empty: 0.
    """
    gains = [[p - r for p, r in zip(point, reference, strict=True)] for point in points]
    return _volume([gain for gain in gains if all(g > 0 for g in gain)])


def _volume(gains: list[list[float]]) -> float:
    if not gains:
        return 0.0
    if len(gains[0]) == 1:
        return max(gain[0] for gain in gains)
    highest_first = sorted(gains, key=lambda gain: -gain[-1])
    ends = [gain[-1] for gain in highest_first[1:]] + [0.0]
    volume, reaching = 0.0, []
    for gain, end in zip(highest_first, ends, strict=True):
        reaching.append(gain[:-1])
        if gain[-1] > end:
            volume += (gain[-1] - end) * _volume(reaching)
    return volume


def hypervolume_gain(
    front: Sequence[Sequence[float]], point: Sequence[float], reference: Sequence[float], maximize: Sequence[bool]
) -> float:
    """HV(front + point) - HV(front), never negative. maximize: per objective, False where smaller is better.

    The volume is in the product of the objectives' units: bring them to one scale first, or the largest decides.
    """
    signs = [1 if larger else -1 for larger in maximize]
    signed = [[s * x for s, x in zip(signs, p, strict=True)] for p in (*front, point, reference)]
    *front, point, reference = signed
    return max(hypervolume([*front, point], reference) - hypervolume(front, reference), 0.0)  # sums round


def hypervolume_multiplier(gain: float) -> float:
    """0.5 + 1.5 tanh(max(gain, 0)), in [0.5, 2): what the next step's rewards are multiplied with.

    One factor on all rewards cancels where advantages are divided by their standard deviation (GRPO, REINFORCE++).
    """
    return 0.5 + 1.5 * math.tanh(max(gain, 0.0))


def gradient_weights(weights: Tensor, gradients: Tensor, *, learning_rate: float = 1e-6, mu: float = 1e-5) -> Tensor:
    """w_i <- softmax_i( log w_i + (lr/mu) sum_j <g_i, g_j> ), [n]: more weight where a gradient helps all objectives.

    weights: [n], positive, summing to 1. gradients: [n, parameters], each objective's policy gradient; j includes i.
    """
    check_per_row(gradients, weights=weights)
    influence = gradients @ gradients.sum(0)
    return torch.softmax(weights.log() + learning_rate / mu * influence, dim=0)
