"""Critic-free advantages from the n samples of each prompt. Scores are [P, n], P prompts; so are the results, detached.

Whether the KL penalty is part of the score, and so of the baseline, is the caller's choice: TRL and verl subtract
beta * sum_t k1 from the score first, OpenRLHF adds the penalty to the tokens afterwards.
"""

from typing import Literal

import torch
from torch import Tensor

from align.errors import ConfigError, TrainingError

Scale = Literal["group", "batch", "none"]


def centred(scores: Tensor) -> Tensor:
    """s_i - mean of the prompt's scores, detached; exactly 0 where they are all equal, which the mean's rounding alone
    would not give: the residue, divided by a deviation of next to nothing, would be trained on."""
    scores = scores.detach()
    equal = (scores == scores[:, :1]).all(-1, keepdim=True)
    return (scores - scores.mean(-1, keepdim=True)).masked_fill(equal, 0.0)


def leave_one_out(scores: Tensor) -> Tensor:
    """RLOO (Ahmadian et al. 2024, arXiv 2402.14740): s_i - mean of the others = n/(n-1) * (s_i - mean). Unbiased."""
    n = _group_size(scores)
    return (n / (n - 1)) * centred(scores)


def group_relative(scores: Tensor, *, scale: Scale = "group", eps: float = 1e-4) -> Tensor:
    """GRPO (Shao et al. 2024, arXiv 2402.03300): (s_i - mean) / (std + eps).

    scale: "group", the paper's, the unbiased deviation of the prompt's scores; "batch", that of all scores (REINFORCE++
    calls it global); "none", Dr. GRPO (Liu et al. 2025, arXiv 2503.20783), which has no bias towards prompts whose
    scores are close. A group without variance gets 0. eps: TRL 1e-4, verl 1e-6.
    """
    _group_size(scores)
    differences = centred(scores)
    if scale == "none":
        return differences
    if scale == "batch":
        return differences / (scores.detach().std() + eps)
    if scale == "group":
        return differences / (scores.detach().std(-1, keepdim=True) + eps)
    raise ConfigError(f"scale must be group, batch or none, got {scale!r}")


def best_only(scores: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Pass@k: the best sample gets (s_1st - s_2nd) / (std + eps), every other 0. With a tie for the best all get 0."""
    _group_size(scores)
    top = scores.topk(2, dim=-1)
    gap = (top.values[:, 0] - top.values[:, 1]) / (scores.std(-1) + eps)
    return torch.zeros_like(scores).scatter(-1, top.indices[:, :1], gap[:, None]).detach()


def _group_size(scores: Tensor) -> int:
    if scores.dim() != 2 or scores.shape[1] < 2:
        raise TrainingError(
            f"a group baseline needs scores [prompts, n] with n of at least 2 samples per prompt, got "
            f"{tuple(scores.shape)}: set num_generations to 2 or more, or use ReMax, with the greedy answer as baseline"
        )
    return scores.shape[1]
