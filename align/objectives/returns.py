"""From scores to per-token rewards, returns and critic-based advantages. All results are detached."""

import torch
from torch import Tensor

from align.errors import ConfigError, TrainingError
from align.objectives.kl import masked_mean
from align.objectives.shapes import check_per_row, check_same


def token_rewards(scores: Tensor, log_ratios: Tensor | None, mask: Tensor, *, beta: float) -> Tensor:
    """r_t = -beta * d_t + [t = last] * score: the KL inside the reward (Ziegler et al. 2019, arXiv 1909.08593), [B, T].

    scores: [B]. log_ratios: d = log pi - log pi_ref of the policy that sampled (k1), [B, T] nats; None with beta 0.
    mask: [B, T], 1 on response tokens including the end-of-sequence token. The score is on the last of them; outside
    the mask the reward is 0.
    """
    check_same(2, log_ratios=log_ratios, mask=mask)
    check_per_row(mask, scores=scores)
    valid = mask.bool()
    rewards = torch.zeros(mask.shape, dtype=scores.dtype, device=scores.device)
    if beta:
        if log_ratios is None:
            raise ConfigError(f"beta is {beta}, and there are no log-ratios to penalise")
        rewards = torch.where(valid, -beta * log_ratios.detach(), rewards)
    return rewards + scores.detach()[:, None] * last_token(valid)


def last_token(mask: Tensor) -> Tensor:
    """One-hot position of each row's last masked token, [B, T] bool."""
    valid = mask.bool()
    return valid & (valid.cumsum(-1) == valid.sum(-1, keepdim=True))


def reward_to_go(rewards: Tensor, mask: Tensor, gamma: float = 1.0) -> Tensor:
    """R_t = sum_{s >= t} gamma^(s-t) r_s over the tokens of the mask, 0 outside it. rewards, mask: [B, T].

    s - t counts tokens of the mask, so a hole (a tool's output) neither adds a reward nor discounts.
    """
    check_same(2, rewards=rewards, mask=mask)
    valid = mask.bool()
    rewards = torch.where(valid, rewards, torch.zeros_like(rewards))
    if gamma == 1.0:
        return rewards.flip(-1).cumsum(-1).flip(-1) * valid
    returns, running = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        running = torch.where(valid[:, t], rewards[:, t] + gamma * running, running)
        returns[:, t] = running
    return returns * valid


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    last_values: Tensor | None = None,
):
    """Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438, eq. 16): advantages, returns [B, T].

        delta_t = r_t + gamma * V_{t+1} - V_t,    A_t = delta_t + gamma * lam * A_{t+1},    return_t = A_t + V_t

    rewards, values: [B, T], or [B, T, H] for H value heads with a reward column each. mask: [B, T]. The value after the
    last token is 0, or `last_values` [B] (or [B, H]), of episodes that were cut (Pardo et al. 2018, arXiv 1712.00378).
    Tokens outside the mask are passed over: the token before a hole looks at the value and the
    advantage after it. The advantages are not whitened; both results are 0 outside the mask.
    """
    check_same(3 if rewards.dim() == 3 else 2, rewards=rewards, values=values)
    check_same(2, mask=mask, rewards=rewards[..., 0] if rewards.dim() == 3 else rewards)
    check_same(last_values=last_values, values_at_one_token=values[:, 0])
    valid = mask.bool()
    if rewards.dim() == 3:
        valid = valid[..., None]
    rewards, values = rewards.detach(), values.detach()
    advantages = torch.zeros_like(values)
    running = torch.zeros_like(values[:, 0])
    next_value = running if last_values is None else last_values.detach()
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        running = torch.where(valid[:, t], delta + gamma * lam * running, running)
        next_value = torch.where(valid[:, t], values[:, t], next_value)
        advantages[:, t] = running
    return torch.where(valid, advantages, 0.0), torch.where(valid, advantages + values, 0.0)


def whiten(values: Tensor, mask: Tensor, *, shift_mean: bool = True, ddof: int = 1, eps: float = 1e-8) -> Tensor:
    """(x - mean) / sqrt(var + eps) over every token of the mask, 0 outside it. values, mask: [B, T].

    `shift_mean=False` adds the mean back, for rewards. The statistics are of this tensor: give it the whole batch of
    the optimiser step, all ranks included, or the ranks' advantages will differ in scale. Values that are all equal
    give exactly 0 (plus the mean), not the mean's rounding divided by sqrt(eps). A mask of fewer than ddof + 1 tokens
    is an error, because its variance is not defined.
    """
    check_same(values=values, mask=mask)
    valid = mask.bool()
    if int(valid.sum()) <= ddof:
        raise TrainingError(f"{int(valid.sum())} tokens cannot be whitened: their variance needs more than {ddof}")
    # Counted from the lowest: that is exactly 0 for equal values, and rounds nothing away where the mean is large.
    lowest = values[valid].min()
    above = torch.where(valid, values - lowest, torch.zeros_like(values))
    mean, count = masked_mean(above, mask), valid.sum()
    variance = masked_mean((above - mean).square(), mask) * count / (count - ddof)
    scaled = (above - mean) * torch.rsqrt(variance + eps)
    return torch.where(valid, scaled if shift_mean else scaled + mean + lowest, torch.zeros_like(values))
