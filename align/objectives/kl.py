"""Estimators of the reverse KL from log-probs of sampled tokens (J. Schulman, "Approximating KL Divergence", 2020).

With d = log pi(y_t|y_<t) - log pi_ref(y_t|y_<t) and y sampled from pi, each function returns one value per token, in
nats. As a *value* (a metric, a penalty inside a reward, detached):

    k1 = d               unbiased, high variance, can be negative
    k2 = d^2 / 2         biased (small while pi is near pi_ref), never negative
    k3 = e^-d - 1 + d    unbiased, never negative, heavy-tailed where pi << pi_ref

As a *loss* (differentiated through log pi, samples from pi), the gradient per token is another matter:

    k1 -> 1 * grad log pi            zero in expectation: useless as a loss
    k2 -> d * grad log pi            the reverse-KL gradient
    k3 -> (1 - e^-d) * grad log pi   in expectation the *forward* KL's gradient, not the reverse's

So: k1 or k3 to report, k1 inside a reward, k2 as a loss term. Nothing is clamped: a value that overflows is a sign that
the tokens were not sampled from pi, and must not be hidden.
"""

import torch
from torch import Tensor

from align.objectives.shapes import check_same


def k1(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """d, per token. logps, ref_logps: any equal shape, natural log. Unbiased value; its gradient is zero on average."""
    check_same(logps=logps, ref_logps=ref_logps)
    return logps - ref_logps


def k2(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """d^2 / 2, per token. Biased value; its gradient is that of the reverse KL on samples from pi."""
    check_same(logps=logps, ref_logps=ref_logps)
    return (logps - ref_logps).square() / 2


def k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """e^-d - 1 + d, per token. Unbiased, non-negative value; its gradient is the forward KL's."""
    check_same(logps=logps, ref_logps=ref_logps)
    d = logps - ref_logps
    return torch.expm1(-d) + d


def masked_sum(values: Tensor, mask: Tensor, dim: int = -1) -> Tensor:
    """Sum over `dim` where mask is non-zero. Values outside the mask do not enter, be they inf or NaN."""
    check_same(values=values, mask=mask)
    return torch.where(mask.bool(), values, torch.zeros_like(values)).sum(dim, dtype=_wide(values))


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over every position where mask is non-zero (a scalar); the mask must not be empty."""
    check_same(values=values, mask=mask)
    return torch.where(mask.bool(), values, torch.zeros_like(values)).sum(dtype=_wide(values)) / mask.bool().sum()


def _wide(values: Tensor) -> torch.dtype:
    """Of sums, at least float32: one of -300 nats has steps of 2 in bfloat16."""
    return torch.promote_types(values.dtype, torch.float32)
