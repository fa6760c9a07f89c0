"""MetaAPO (arXiv 2509.23371): offline and online DPO, mixed pair by pair by a learned weight.

Formulas of the authors' code (junming-yang/MetaAPO, 1b1b4c5). A prompt has an offline pair and one that the policy
itself wrote; Delta_off and Delta_on are their unscaled log-ratio differences.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear, logsigmoid

from align.objectives.shapes import check_same


def meta_weight(
    offline_delta: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor
) -> Tensor:
    """w = h(ls(Delta_off)) in (0, 1), [B]: near 0.5 for pairs that the policy ranks well, smaller for the others.

    h is Linear(1, H), tanh, Linear(H, 1), sigmoid; its weights are [H, 1], [H], [1, H], [1]. The authors start with all
    weights 0.1 and biases 0, where the gradients of the H units are equal: they stay one effective unit.
    """
    hidden = torch.tanh(linear(logsigmoid(offline_delta).unsqueeze(-1), fc1_weight, fc1_bias))
    return linear(hidden, fc2_weight, fc2_bias).squeeze(-1).sigmoid()


def meta_mixture(offline: Tensor, online: Tensor, weight: Tensor) -> Tensor:
    """w L_off + (1 - w) L_on, [B]. offline, online: the losses (DPO) of the two pairs of each prompt, [B].

    weight: w of `meta_weight`, [B]. The policy's step detaches it; the meta step has losses without gradient instead,
    whose gradient to w is L_off - L_on: h learns to give weight to the pair with the smaller loss.
    """
    check_same(1, offline=offline, online=online, weight=weight)
    return weight * offline + (1 - weight) * online
