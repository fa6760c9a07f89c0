"""f-DPO: regularisers other than the reverse KL (Wang et al. 2023, arXiv 2309.16240).

The optimal policy's reward is beta f'(pi/ref) + const, so Delta becomes the difference of the scores
f'(e^rho) of the two completions, with rho = log pi(y|x) - log ref(y|x).
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def forward_kl(rho: Tensor) -> Tensor:
    """1 - e^-rho, of any shape. Where -rho is beyond `largest_exponent`, a constant: the gradient there is 0."""
    return -torch.expm1((-rho).clamp(max=largest_exponent(rho.dtype)))


def js_divergence(rho: Tensor) -> Tensor:
    """log( 2 e^rho / (1 + e^rho) ), of any shape."""
    return math.log(2) + logsigmoid(rho)


def alpha_divergence(rho: Tensor, *, alpha: float = 0.5) -> Tensor:
    """( e^((alpha-1) rho) - 1 ) / (alpha - 1), of any shape; alpha -> 1 is rho, the reverse KL; alpha = 0 the forward.

    A constant where the exponent is beyond `largest_exponent`: the gradient there is 0.
    """
    if alpha == 1:
        return rho
    return torch.expm1(((alpha - 1) * rho).clamp(max=largest_exponent(rho.dtype))) / (alpha - 1)


def largest_exponent(dtype: torch.dtype) -> float:
    """An x whose e^x is in the range of the dtype, and its square too (IPO, norms of gradients): 39.9 in float32."""
    return 0.45 * math.log(torch.finfo(dtype).max)


F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


def f_divergence(name: str, alpha: float | None = None) -> Callable[[Tensor], Tensor] | None:
    """What `PairLogps.divergence` takes. name: of F_DIVERGENCES; alpha: of `alpha_divergence`."""
    if name == "reverse_kl":
        return None
    if name == "alpha_divergence":
        return partial(alpha_divergence, alpha=0.5 if alpha is None else alpha)
    return {"forward_kl": forward_kl, "js_divergence": js_divergence}[name]
