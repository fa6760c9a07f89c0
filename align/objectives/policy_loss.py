"""Losses of the policy and of the critic, per token, and how tokens are put together.

Aggregation is its own function with an explicit normaliser, so that micro-batches and ranks add up to the loss of the
whole batch.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from align.errors import ConfigError
from align.objectives.kl import masked_mean, masked_sum
from align.objectives.shapes import check_detached, check_same

RatioLevel = Literal["token", "sequence", "sequence_mean"]
AGGREGATIONS = ("token_mean", "sequence_sum", "sequence_mean", "constant")
MAX_LOG_RATIO = 20.0  # e^20 is far outside any trust region: beyond it only overflow would be added


@dataclass
class PolicyLoss:
    """losses: [B, T], with gradient, 0 outside the mask. The rest is detached: ratio [B, T]; clipped and dual_clipped
    [B, T] bool, tokens whose loss the clip (the dual clip) decides; approx_kl, the mean of k1 of old against new;
    correction, importance weights against the engine, [B, T], None without."""

    losses: Tensor
    ratio: Tensor
    clipped: Tensor
    dual_clipped: Tensor
    approx_kl: Tensor
    correction: Tensor | None = None


def _inside(logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(mask as booleans, advantages with 0 outside): a NaN there, times a gradient of 0, would be one."""
    check_same(2, logps=logps, old_logps=old_logps, advantages=advantages, mask=mask)
    check_detached(old_logps=old_logps, advantages=advantages)
    valid = mask.bool()
    return valid, torch.where(valid, advantages, torch.zeros_like(advantages))


def clipped_policy_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    ratio_level: RatioLevel = "token",
) -> PolicyLoss:
    """PPO's clipped surrogate (Schulman et al. 2017, arXiv 1707.06347, eq. 7): max(-A rho, -A clip(rho, 1-l, 1+h)).

    Args:
        logps (with gradient), old_logps, advantages, mask: [B, T].
        clip_low, clip_high: different for DAPO's "clip higher".
        dual_clip: c > 1 caps the loss of a negative advantage at -A * c (Ye et al. 2020, arXiv 1912.09729).
        ratio_level: token; "sequence" exp(sum_t log rho_t), the ratio of RLOO in TRL; "sequence_mean" exp(mean_t log
            rho_t), the length-normalised one of GSPO (Zheng et al. 2025, arXiv 2507.18071).
    """
    if dual_clip is not None and dual_clip <= 1:
        raise ConfigError(f"dual_clip must be above 1, got {dual_clip}")
    valid, advantages = _inside(logps, old_logps, advantages, mask)
    token_log_ratio = torch.where(valid, logps - old_logps, torch.zeros_like(logps))
    log_ratio = token_log_ratio
    if ratio_level != "token":
        log_ratio = token_log_ratio.sum(-1, keepdim=True)
        if ratio_level == "sequence_mean":
            log_ratio = log_ratio / valid.sum(-1, keepdim=True).clamp(min=1)
        log_ratio = log_ratio.expand(mask.shape)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    plain = -advantages * ratio
    bounded = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    losses = torch.maximum(plain, bounded)
    clipped = valid & (bounded > plain)
    dual_clipped = torch.zeros_like(valid)
    if dual_clip is not None:
        cap = -advantages * dual_clip
        dual_clipped = valid & (advantages < 0) & (losses > cap)
        losses = torch.where(advantages < 0, torch.minimum(losses, cap), losses)
    losses = torch.where(valid, losses, torch.zeros_like(losses))
    approx_kl = masked_mean(-token_log_ratio.detach(), mask)
    return PolicyLoss(losses, torch.where(valid, ratio, 1.0).detach(), clipped, dual_clipped, approx_kl)


def cispo_policy_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, *, high: float) -> PolicyLoss:
    """CISPO: -sg(min(rho, high)) A log pi (MiniMax-M1, 2025, arXiv 2506.13585), without a lower bound, as in TRL.

    The importance weight is cut and not differentiated, so that no token is without gradient. logps (with gradient),
    old_logps, advantages, mask: [B, T]. high: the largest weight, 5 in ScaleRL (arXiv 2510.13786).
    """
    valid, advantages = _inside(logps, old_logps, advantages, mask)
    log_ratio = torch.where(valid, logps.detach() - old_logps, torch.zeros_like(logps))
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    losses = torch.where(valid, -ratio.clamp(max=high) * advantages * logps, torch.zeros_like(logps))
    return PolicyLoss(losses, ratio, valid & (ratio > high), torch.zeros_like(valid), masked_mean(-log_ratio, mask))


def sapo_policy_loss(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, *, above: float = 1.0, below: float = 1.05
) -> PolicyLoss:
    """SAPO: -4 / tau sigmoid(tau (rho - 1)) A (arXiv 2511.20347), a soft gate in the place of the clip, whose slope at
    rho = 1 is the ratio's.

    logps (with gradient), old_logps, advantages, mask: [B, T]. above, below: tau of tokens whose advantage is above 0
    and of the others; the larger, the sooner a ratio away from 1 loses its gradient.
    """
    valid, advantages = _inside(logps, old_logps, advantages, mask)
    log_ratio = torch.where(valid, logps - old_logps, torch.zeros_like(logps))
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    tau = torch.where(advantages > 0, torch.tensor(above).to(ratio), torch.tensor(below).to(ratio))
    losses = torch.where(valid, -4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantages, torch.zeros_like(logps))
    none = torch.zeros_like(valid)
    return PolicyLoss(losses, ratio.detach(), none, none, masked_mean(-log_ratio.detach(), mask))


VESPO_LOWEST = math.log(1e-8)  # the published code's


def vespo_policy_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    above: tuple[float, float] = (2.0, 3.0),
    below: tuple[float, float] = (3.0, 2.0),
    correction: Tensor | None = None,
) -> PolicyLoss:
    """VESPO: -sg(phi(w)) A log pi, phi(w) = w^k e^(l (1 - w)) with w the sequence's ratio (arXiv 2602.10693; TRL's).

    logps (with gradient), old_logps, advantages, mask: [B, T]. above, below: k and l of tokens whose advantage is at
    least 0 and of the others. correction: log of the tokens' importance weights against the engine, [B, T],
    which then belong to w.
    """
    valid, advantages = _inside(logps, old_logps, advantages, mask)
    log_ratio = torch.where(valid, logps.detach() - old_logps, torch.zeros_like(logps))
    log_w = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).sum(-1, keepdim=True)
    if correction is not None:
        check_same(2, correction=correction, mask=mask)
        log_w = log_w + torch.where(valid, correction.clamp(VESPO_LOWEST, MAX_LOG_RATIO), 0.0).sum(-1, keepdim=True)
    log_w = log_w.clamp(VESPO_LOWEST, MAX_LOG_RATIO)
    k = torch.where(advantages >= 0, torch.tensor(above[0]).to(log_w), torch.tensor(below[0]).to(log_w))
    decay = torch.where(advantages >= 0, torch.tensor(above[1]).to(log_w), torch.tensor(below[1]).to(log_w))
    weight = (decay + k * log_w - decay * log_w.exp()).exp()
    losses = torch.where(valid, -weight * advantages * logps, torch.zeros_like(logps))
    ratio = torch.where(valid, log_w.exp().expand(mask.shape), 1.0)
    none = torch.zeros_like(valid)
    return PolicyLoss(losses, ratio, none, none, masked_mean(-log_ratio, mask))


def off_policy_kept(advantages: Tensor, logps: Tensor, sampling_logps: Tensor, mask: Tensor, limit: float) -> Tensor:
    """DeepSeek-V3.2's off-policy sequence mask (arXiv 2512.02556, eq. 9), [B, T]: False on tokens of negative advantage
    in sequences whose mean of log pi_sampling - log pi is above `limit` (nats per token). All tensors: [B, T]."""
    check_same(2, advantages=advantages, logps=logps, sampling_logps=sampling_logps, mask=mask)
    gap = masked_sum(sampling_logps - logps.detach(), mask, dim=-1) / mask.sum(-1).clamp(min=1)
    return (advantages >= 0) | (gap <= limit)[:, None]


def value_losses(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: float | None = 0.2
) -> tuple[Tensor, Tensor]:
    """0.5 * max((V - R)^2, (V_clip - R)^2) with V_clip = V_old + clip(V - V_old, +-clip): losses, clipped, [B, T] each.

    values (with gradient), old_values, returns, mask: [B, T] (or [B, T, H] with H heads, mask [B, T, 1]). clip None:
    the plain squared error.
    """
    check_same(values=values, old_values=old_values, returns=returns)
    check_same(values_of_one_head=values[..., :1] if values.dim() == 3 else values, mask=mask)
    check_detached(old_values=old_values, returns=returns)
    valid = mask.bool().expand(values.shape)
    values, old_values, returns = (torch.where(valid, x, torch.zeros_like(x)) for x in (values, old_values, returns))
    losses = (values - returns).square()
    clipped = torch.zeros_like(valid)
    if clip is not None:
        bounded = (old_values + (values - old_values).clamp(-clip, clip) - returns).square()
        clipped = valid & (bounded > losses)
        losses = torch.maximum(losses, bounded)
    return torch.where(valid, losses / 2, torch.zeros_like(losses)), clipped


def aggregate_tokens(losses: Tensor, mask: Tensor, how: str, normalizer: float | Tensor | None = None) -> Tensor:
    """One number from token losses [B, T], the sum below over `normalizer`.

    how             sum                                       normalizer None means
    token_mean      of all tokens                             the tokens of this mask (DAPO, verl)
    sequence_sum    of all tokens                             the sequences (the policy gradient itself)
    sequence_mean   of each sequence's mean                   the sequences (GRPO)
    constant        of all tokens                             not allowed: give B * the longest length (Dr. GRPO)

    When this is one of several micro-batches or ranks, `normalizer` is the count of the whole optimiser step.
    """
    if how not in AGGREGATIONS:
        raise ConfigError(f"loss aggregation must be one of {', '.join(AGGREGATIONS)}, got {how!r}")
    check_same(2, losses=losses, mask=mask)
    sums = masked_sum(losses, mask)
    if how == "sequence_mean":
        sums = sums / mask.bool().sum(-1).clamp(min=1)
    if normalizer is None:
        if how == "constant":
            raise ConfigError("the aggregation 'constant' needs its constant: the largest number of tokens of a batch")
        normalizer = mask.bool().sum() if how == "token_mean" else mask.bool().any(-1).sum()
    return sums.sum() / normalizer
