"""MODPO: direct preference optimisation of a weighted sum of objectives (Zhou et al. 2023, arXiv 2310.03708).

One objective, k, has preference pairs, on which the policy is trained; every other objective enters as a *margin
reward*: one number per completion. On exact data the minimiser is the optimum of reinforcement learning on the weighted
sum, pi* ~ ref * exp(w . r / beta), for as many objectives as there are weights.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from align.errors import ConfigError, TrainingError
from align.objectives.shapes import check_same

LOSS_TYPES = ("sigmoid", "hinge")


def modpo_rewards(
    logps: Tensor, ref_logps: Tensor, margin_rewards: Tensor, *, weight: float, margin_weights: Tensor, beta: float
) -> Tensor:
    """The policy's own estimate of r_k for each completion, up to a constant per prompt, [B].

        (beta * (log pi(y|x) - log ref(y|x)) - w_-k . r_-k(x, y)) / w_k             (equation 8 read as a reward)

    logps, ref_logps: [B], summed over the completion's tokens, natural log. margin_rewards: [B, M], one column per
    other objective, in units of r_k: their scale matters, a constant per prompt does not. weight: w_k > 0.
    margin_weights: [M]. beta: strength of the KL, nats per unit of reward. Differentiable in `logps` only.

    Raises ConfigError for w_k <= 0: the loss divides by it.
    """
    check_weight(weight)
    check_same(1, logps=logps, ref_logps=ref_logps)
    check_same(1, margin_weights=margin_weights)
    if margin_rewards.shape != (len(logps), len(margin_weights)):
        raise TrainingError(
            f"margin_rewards {list(margin_rewards.shape)}: must be [{len(logps)}, {len(margin_weights)}], a row per "
            "completion and a column per other objective"
        )
    margins = margin_rewards.detach().to(logps.dtype) @ margin_weights.to(logps)
    return (beta * (logps - ref_logps.detach()) - margins) / weight


def modpo_loss(chosen_rewards: Tensor, rejected_rewards: Tensor, loss_type: str = "sigmoid") -> Tensor:
    """Losses of the pairs, [B], from the `modpo_rewards` of their completions, [B] each.

    sigmoid: -log sigmoid(h); hinge: max(0, 1 - h); h: the chosen one's reward less the rejected one's. Without other
    objectives (w_k = 1) this is DPO.
    """
    check_same(1, chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards)
    h = chosen_rewards - rejected_rewards
    if loss_type == "sigmoid":
        return -logsigmoid(h)
    if loss_type == "hinge":
        return torch.relu(1 - h)
    raise ConfigError(f"the loss of MODPO is one of {', '.join(LOSS_TYPES)}, got {loss_type!r}")


def check_weight(weight: float, name: str = "the objective that the pairs are about") -> None:
    """ConfigError unless w_k > 0."""
    if not weight > 0:
        raise ConfigError(
            f"{name} has weight {weight}, and MODPO divides by it: it must be > 0. With weight 0 its pairs say "
            "nothing: take the policy that DPO trained on another objective's pairs, or train on those pairs with this "
            "objective as a margin reward"
        )
