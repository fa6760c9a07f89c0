"""SparsePO and MaPO (arXiv 2410.05102): TDPO1's objective with a weight on every token.

    U(y) = sum_t m_u,t (log pi(y_t|x, y_<t) - log ref(y_t|x, y_<t))
    D(y) = sum_t m_d,t KL( ref(.|x, y_<t) || pi(.|x, y_<t) )
    z    = (U_w - U_l) - (D_l - D_w)
    loss = -log sigmoid(beta z) + lambda_u (|m_u(y_w)|_1 + |m_u(y_l)|_1) + lambda_d (|m_d(y_w)|_1 + |m_d(y_l)|_1)

w is the chosen completion and l the rejected one. Checked against the authors' code (huawei-noah/HEBO, SparsePO/,
ee6112d). Nothing is detached: gradients reach the policy through the log-ratios and the KL, and the masks through their
weights. With m_u = m_d = 1 this is TDPO1 (arXiv 2404.11999).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from align.objectives.shapes import check_same


@dataclass
class MaskedSums:
    """Sums over the tokens of each completion, [N] each, in nats (u, d) and in units of the masks (l1_u, l1_d).

    u: U(y), the masked log-ratio. d: D(y), the masked KL, never negative. l1_u, l1_d: |m_u|_1 and |m_d|_1, sums and not
    means, so they grow with the length.
    """

    u: Tensor
    d: Tensor
    l1_u: Tensor
    l1_d: Tensor

    def __post_init__(self):
        check_same(1, **vars(self))


def masked_sums(
    log_ratios: Tensor, kl: Tensor, mask: Tensor, m_u: Tensor | None = None, m_d: Tensor | None = None
) -> MaskedSums:
    """U, D and the L1 norms of N completions.

    Args:
        log_ratios: [N, L], log pi(y_t) - log ref(y_t) in nats.
        kl: [N, L], KL(ref || pi) at the position that predicts y_t, in nats.
        mask: [N, L], non-zero at completion tokens; nothing outside counts.
        m_u, m_d: [N, L], weights >= 0 of the two terms; None is weight 1 (the term is not masked).
    """
    check_same(2, log_ratios=log_ratios, kl=kl, mask=mask, m_u=m_u, m_d=m_d)
    real, ones = mask.bool(), torch.ones_like(log_ratios)
    m_u, m_d, log_ratios, kl = (  # what is outside may be NaN, which 0 does not take away
        torch.where(real, values, 0.0)
        for values in (ones if m_u is None else m_u, ones if m_d is None else m_d, log_ratios, kl)
    )
    return MaskedSums(
        u=(m_u * log_ratios).sum(-1), d=(m_d * kl).sum(-1), l1_u=m_u.abs().sum(-1), l1_d=m_d.abs().sum(-1)
    )


def sparse_po_loss(
    chosen: MaskedSums, rejected: MaskedSums, *, beta: float, l1_u: float = 0.0, l1_d: float = 0.0
) -> Tensor:
    """Losses of the pairs, [B]; their mean is the objective.

    l1_u, l1_d: lambda_u and lambda_d. For a common mask, where both norms are those of one mask, the authors halve both
    before they get here (see `align.trainers.sparsepo`).
    """
    check_same(1, chosen=chosen.u, rejected=rejected.u)
    logits = (chosen.u - rejected.u) - (rejected.d - chosen.d)
    losses = -F.logsigmoid(beta * logits)
    if l1_u:
        losses = losses + l1_u * (chosen.l1_u + rejected.l1_u)
    if l1_d:
        losses = losses + l1_d * (chosen.l1_d + rejected.l1_d)
    return losses


def implicit_rewards(sums: MaskedSums, beta: float) -> Tensor:
    """beta (U + D), [N]: the rewards whose margin is inside the sigmoid.

    The authors log beta (U - D) for learned masks, whose accuracies and margins are not those of their objective.
    """
    return beta * (sums.u + sums.d)


def sparsity(weights: Tensor, mask: Tensor) -> Tensor:
    """Share of the tokens of each completion whose weight is exactly 0, [N]. weights, mask: [N, L]."""
    check_same(2, weights=weights, mask=mask)
    real = mask.bool()
    return ((weights == 0) & real).sum(-1) / real.sum(-1)
