"""Losses of pairwise reward models. Scores are those of the chosen and of the rejected completion of each pair, [B]."""

import torch.nn.functional as F
from torch import Tensor


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | None = None) -> Tensor:
    """-log sigmoid(s+ - s- - m), per pair [B] (Bradley & Terry 1952; margin: Touvron et al. 2023, Llama 2, eq. 2)."""
    difference = chosen - rejected
    return -F.logsigmoid(difference if margin is None else difference - margin)


def score_l2(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(s+^2 + s-^2) / 2, per pair [B]: keeps the scores' scale finite (Open-Assistant's RMLoss, Coste et al. 2023)."""
    return (chosen.square() + rejected.square()) / 2


def centering(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(s+ + s-)^2, per pair [B]: fixes the free offset of Bradley-Terry scores (Eisenstein et al. 2023, eq. 2)."""
    return (chosen + rejected).square()
