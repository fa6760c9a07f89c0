"""Token-level DPO (Zeng et al. 2024, arXiv 2404.11999): DPO with a forward KL per token of both completions.

K(y) = sum_t KL( ref(.|x, y_<t) || pi(.|x, y_<t) ), over the whole vocabulary at the completion's positions: the
*sequential forward* KL (`align.modeling.token_values` computes it). Conventions as in `align.objectives.dpo`.
"""

from torch import Tensor
from torch.nn.functional import logsigmoid

from align.objectives.pair_logps import PairLogps, required


def chosen_kl(pairs: PairLogps) -> Tensor:
    return required(pairs.chosen_kl, "the KL per token")


def rejected_kl(pairs: PairLogps) -> Tensor:
    return required(pairs.rejected_kl, "the KL per token")


def tdpo1(pairs: PairLogps, *, beta: float = 0.1) -> Tensor:
    """-ls(beta (Delta - (K_l - K_w))). The gradient flows through both KLs."""
    return -logsigmoid(beta * (pairs.delta - (rejected_kl(pairs) - chosen_kl(pairs))))


def tdpo2(pairs: PairLogps, *, beta: float = 0.1, tdpo_alpha: float = 0.5) -> Tensor:
    """-ls(beta (Delta - alpha (K_l - stopgrad(K_w)))). The chosen completion's KL gets no gradient."""
    return -logsigmoid(beta * (pairs.delta - tdpo_alpha * (rejected_kl(pairs) - chosen_kl(pairs).detach())))


def tdpo_rewards(pairs: PairLogps, *, beta: float) -> tuple[Tensor, Tensor]:
    """beta (rho + K) of chosen and rejected, [B] each: what the authors log as rewards."""
    return beta * (pairs.chosen_ratio + chosen_kl(pairs)), beta * (pairs.rejected_ratio + rejected_kl(pairs))
