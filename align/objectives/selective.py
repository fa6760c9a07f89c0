"""Rho-1's selective language modelling (Lin et al. 2024, arXiv 2404.07965): which tokens of a batch are trained."""

from torch import Tensor

from align.objectives.shapes import check_same


def excess_loss(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """L_delta(x_i) = L_theta(x_i) - L_ref(x_i) = log p_ref(x_i | x_<i) - log p_theta(x_i | x_<i), in nats (eq. 3).

    logps, ref_logps: of the same tokens under the policy and under the reference, any one shape. Large where the
    reference, which was trained on text as it should be, knows the token and the policy does not yet.
    """
    check_same(logps=logps, ref_logps=ref_logps)
    return ref_logps - logps


def selection_threshold(excess: Tensor, share: float) -> Tensor:
    """The excess loss from which on a token is trained, a scalar: the k-th largest of all, k = `share` of them, rounded
    and at least one.

    The loss is then L_SLM = - sum_i I(x_i) log p_theta(x_i | x_<i) / (N k%), I = 1 where excess_i >= this (eq. 4 and
    5); tokens that tie with the last one are all trained.

    Args:
        excess: [N], of all tokens that are ranked together; in the paper those of a batch.
        share: the paper's k%, above 0 and at most 1 (0.6 for the 1B model of the paper, 0.7 for that of 7B).
    """
    kept = max(round(share * excess.numel()), 1)
    return excess.topk(kept).values[-1]
