"""Numbers of the weights of tokens, for the log."""

from torch import Tensor

from align.objectives.kl import masked_sum
from align.objectives.sparse_po import sparsity


def by_side(name: str, values: Tensor) -> dict[str, Tensor]:
    """Values [2B] as a metric of the chosen and one of the rejected, [B] each."""
    chosen, rejected = values.chunk(2)
    return {f"{name}/chosen": chosen, f"{name}/rejected": rejected}


def mask_metrics(name: str, weights: Tensor | None, mask: Tensor) -> dict[str, Tensor]:
    """Mean weight, share of exact zeros and L1 norm (a sum over tokens) of every completion."""
    if weights is None:
        return {}
    norms = masked_sum(weights.abs(), mask)
    return {
        **by_side(f"{name}_mean", norms / mask.sum(-1)),
        **by_side(f"{name}_sparsity", sparsity(weights, mask)),
        **by_side(f"{name}_l1", norms),
    }
