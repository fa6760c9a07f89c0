"""What weighs the log-prob of each token in a policy gradient. All weights are detached."""

from typing import Literal

import torch
from torch import Tensor

from align.errors import ConfigError
from align.objectives.kl import k1
from align.objectives.returns import reward_to_go
from align.objectives.shapes import check_per_row, check_same

KLMode = Literal["one_step", "to_go", "none"]


def remax_token_weights(
    rewards: Tensor,
    greedy_rewards: Tensor,
    logps: Tensor,
    ref_logps: Tensor | None,
    mask: Tensor,
    *,
    beta: float,
    gamma: float = 1.0,
    reward_clip: float | None = None,
    kl_mode: KLMode = "one_step",
) -> Tensor:
    """ReMax (Li et al. 2023, arXiv 2310.10505): the greedy completion's reward is the baseline.

    Returns the weights [B, T], detached.

    With A = clip(r - r_greedy, +-reward_clip), L response tokens, t = 0 .. L-1 and d the per-token log-ratio:

        one_step:  w_t = A * gamma^(L-t) - beta * d_t                 (the authors' released trainer)
        to_go:     w_t = A * gamma^(L-t) - beta * sum_{s>=t} d_s      (KL inside the reward; verl's, at gamma = 1)
        none:      w_t = A * gamma^(L-t)

    The last token (t = L-1) already carries one gamma: that is the released convention. The *difference* is clipped,
    not each reward. The baseline carries no KL. Outside the mask the weight is 0.

    Args:
        rewards, greedy_rewards: [B], one per sampled completion, and that of the greedy completion of its prompt.
        logps, ref_logps: [B, T] nats, of the policy that sampled and of the reference (None with kl_mode "none").
        mask: [B, T], 1 on response tokens including the end-of-sequence token.
    """
    if kl_mode not in ("one_step", "to_go", "none"):
        raise ConfigError(f"kl_mode must be one_step, to_go or none, got {kl_mode!r}")
    check_same(2, logps=logps, ref_logps=ref_logps, mask=mask)
    check_per_row(mask, rewards=rewards, greedy_rewards=greedy_rewards)
    valid = mask.bool()
    advantage = (rewards - greedy_rewards).detach()
    if reward_clip is not None:
        advantage = advantage.clamp(-reward_clip, reward_clip)
    weights = advantage[:, None].expand(mask.shape)
    if gamma != 1.0:
        # cumsum counts the response tokens up to and including t, so the exponent is L - (count - 1) = L - t
        exponent = valid.sum(-1, keepdim=True) - valid.cumsum(-1) + 1
        weights = weights * gamma ** exponent.to(weights.dtype)
    if kl_mode != "none":
        if ref_logps is None:
            raise ConfigError(f"kl_mode {kl_mode} needs the reference's log-probs")
        log_ratio = k1(logps, ref_logps).detach()
        weights = weights - beta * (log_ratio if kl_mode == "one_step" else reward_to_go(log_ratio, mask))
    return torch.where(valid, weights, torch.zeros_like(weights))
