"""Importance weights and masks for rollouts whose engine differs a little from the policy that is trained.

With l_t = log pi_train(y_t) - log pi_engine(y_t), rho_t = e^l_t. All results are detached; a log-ratio outside the mask
does not enter.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from align.errors import ConfigError
from align.objectives.kl import masked_mean, masked_sum
from align.objectives.policy_loss import MAX_LOG_RATIO, RatioLevel
from align.objectives.shapes import check_same

LEVELS = get_args(RatioLevel)
Outside = Literal["truncate", "mask"]


def log_ratios(old_logps: Tensor, rollout_logps: Tensor, mask: Tensor) -> Tensor:
    """l_t, [B, T], 0 outside the mask. old_logps: the trainer's, before the update; rollout_logps: the engine's."""
    check_same(2, old_logps=old_logps, rollout_logps=rollout_logps, mask=mask)
    valid = mask.bool()
    return torch.where(valid, old_logps - rollout_logps, torch.zeros_like(old_logps)).detach()


def importance_weights(
    log_ratio: Tensor,
    mask: Tensor,
    *,
    level: RatioLevel = "token",
    high: float,
    low: float | None = None,
    outside: Outside = "truncate",
    normalize: bool = False,
) -> Tensor:
    """Weights [B, T] of the token losses, 0 outside the mask.

    rho of the token, of the sequence (e^sum_t l_t) or its geometric mean over tokens (e^mean_t l_t). A weight outside
    [low, high] is cut to the bound ("truncate": TIS, Yao et al. 2025) or dropped ("mask": IcePop). normalize divides by
    the mean weight of the batch (over tokens, or over sequences), so that their mean is 1.
    """
    if level not in LEVELS or outside not in ("truncate", "mask"):
        raise ConfigError(f"rollout correction: level is one of {', '.join(LEVELS)} and outside truncate or mask")
    if not high > 0 or (low is not None and not 0 <= low < high):
        raise ConfigError(f"rollout correction: needs 0 <= low < high, got low {low}, high {high}")
    check_same(2, log_ratio=log_ratio, mask=mask)
    valid = mask.bool()
    summed = log_ratio
    if level != "token":
        summed = masked_sum(log_ratio, mask)[:, None]
        if level == "sequence_mean":
            summed = summed / valid.sum(-1, keepdim=True).clamp(min=1)
    weights = summed.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    if outside == "truncate":
        weights = weights.clamp(min=low, max=high)
    else:
        weights = weights * (weights <= high) * (weights >= (low or 0.0))
    if normalize:
        weights = weights / (masked_mean(weights, mask) if level == "token" else weights[valid.any(-1)].mean())
    return torch.where(valid, weights.expand(mask.shape), torch.zeros_like(log_ratio)).detach()


def mismatch(log_ratio: Tensor, mask: Tensor) -> dict[str, float]:
    """How far the engine is from the trainer, in numbers to log.

    kl and kl_k3: KL(engine || trainer) per token in nats (k1 and k3). chi2_token, chi2_sequence: mean of rho^2 - 1, of
    tokens and of whole sequences. effective_sample_size: share of the tokens, 1 / mean of (rho / mean rho)^2.
    """
    check_same(2, log_ratio=log_ratio, mask=mask)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    sequence = masked_sum(log_ratio, mask).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    mean = masked_mean(ratio, mask)
    values = {
        "kl": -masked_mean(log_ratio, mask),
        "kl_k3": masked_mean(log_ratio.expm1() - log_ratio, mask),
        "ratio_mean": mean,
        "ratio_max": ratio.masked_fill(~mask.bool(), 0.0).max(),
        "chi2_token": masked_mean(ratio.square(), mask) - 1,
        "chi2_sequence": sequence.square().mean() - 1,
        "effective_sample_size": 1 / masked_mean((ratio / mean).square(), mask),
    }
    return {name: value.item() for name, value in values.items()}
