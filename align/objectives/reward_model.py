"""Losses of pairwise reward models. Scores are those of the chosen and of the rejected completion of each pair, [B]."""

import torch.nn.functional as F
from torch import Tensor

from align.objectives.shapes import check_per_row, check_same


def bradley_terry_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, chosen_prob: Tensor | None = None
) -> Tensor:
    """-log sigmoid(s+ - s- - m), per pair [B] (Bradley & Terry 1952; margin: Touvron et al. 2023, Llama 2, eq. 2).

    chosen_prob: p [B] in [0, 1], the probability that the chosen answer is preferred (1 where absent): then it is the
    cross-entropy -p log sigmoid(d) - (1 - p) log sigmoid(-d) with d = s+ - s- - m, least where sigmoid(d) = p.
    """
    check_same(chosen=chosen, rejected=rejected)
    check_per_row(chosen[0] if chosen.dim() == 2 else chosen, margin=margin, chosen_prob=chosen_prob)
    difference = chosen - rejected if margin is None else chosen - rejected - margin
    losses = -F.logsigmoid(difference)
    # -log sigmoid(-d) = -log sigmoid(d) + d
    return losses if chosen_prob is None else losses + (1 - chosen_prob) * difference


def score_l2(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(s+^2 + s-^2) / 2, per pair [B]: keeps the scores' scale finite (Open-Assistant's RMLoss, Coste et al. 2023)."""
    check_same(chosen=chosen, rejected=rejected)
    return (chosen.square() + rejected.square()) / 2


def centering(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(s+ + s-)^2, per pair [B]: fixes the free offset of Bradley-Terry scores (Eisenstein et al. 2023, eq. 2)."""
    check_same(chosen=chosen, rejected=rejected)
    return (chosen + rejected).square()
