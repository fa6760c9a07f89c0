"""Losses of the DPO family against a reference: one function per loss, from the pairs' log-probs to a loss per pair.

Every function takes `PairLogps` and its options by keyword, and returns [B] in nats; the objective is their mean.
Symbols are explained in `align.objectives.pair_logps`; z = beta * Delta, and ls(z) = log sigmoid(z).
"""

from torch import Tensor
from torch.nn.functional import logsigmoid

from align.objectives.pair_logps import PairLogps


def sigmoid(pairs: PairLogps, *, beta: float = 0.1) -> Tensor:
    """-ls(z), [B]: DPO (Rafailov et al. 2023, arXiv 2305.18290, eq. 7)."""
    return -logsigmoid(beta * pairs.delta)
