"""Critic-free advantages from the n samples of each prompt. Scores are [P, n], P prompts; so are the results, detached.

Whether the KL penalty is part of the score, and so of the baseline, is the caller's choice: TRL and verl subtract
beta * sum_t k1 from the score first, OpenRLHF adds the penalty to the tokens afterwards.
"""

from typing import Literal

import torch
from torch import Tensor

from align.errors import ConfigError, TrainingError
from align.objectives.shapes import check_same

Scale = Literal["group", "batch", "none"]


def centred(scores: Tensor, kept: Tensor | None = None) -> Tensor:
    """s_i - mean of the prompt's scores, detached, at least in float32; exactly 0 where they are all equal, which the
    mean's rounding alone would not give: the residue, divided by a deviation of next to nothing, would be trained on.

    kept: [P, n] bool, the samples that count, None for all; the others get 0 and are in no mean.
    """
    return _above_mean(scores, kept).to(_wide(scores))


def _above_mean(scores: Tensor, kept: Tensor | None) -> Tensor:
    """`centred` in float64."""
    check_same(scores=scores, kept=kept)
    scores = scores.detach().double()
    kept = torch.ones_like(scores, dtype=torch.bool) if kept is None else kept
    # Counted from the lowest: that is exactly 0 for equal scores, and rounds nothing away where the mean is large.
    above = (scores - scores.where(kept, torch.inf).amin(-1, keepdim=True)).where(kept, 0.0)
    means = above.sum(-1, keepdim=True) / kept.sum(-1, keepdim=True).clamp(min=1)
    return (above - means).where(kept, 0.0)


def _wide(scores: Tensor) -> torch.dtype:
    """Of the results: half precision would round advantages."""
    return torch.promote_types(scores.dtype, torch.float32)


def leave_one_out(scores: Tensor, kept: Tensor | None = None) -> Tensor:
    """RLOO (Ahmadian et al. 2024, arXiv 2402.14740): s_i - mean of the others = n/(n-1) * (s_i - mean). Unbiased.

    kept: as in `centred`; n is then the count of those, and an only one gets 0.
    """
    n = _group_size(scores)
    if kept is not None:
        counts = kept.sum(-1, keepdim=True)
        return counts / (counts - 1).clamp(min=1) * centred(scores, kept)
    return (n / (n - 1)) * centred(scores)


def group_relative(scores: Tensor, *, scale: Scale = "group", eps: float = 1e-4, kept: Tensor | None = None) -> Tensor:
    """GRPO (Shao et al. 2024, arXiv 2402.03300): (s_i - mean) / (std + eps).

    scale: "group", the paper's, the unbiased deviation of the prompt's scores; "batch", that of all scores (REINFORCE++
    calls it global); "none", Dr. GRPO (Liu et al. 2025, arXiv 2503.20783), which has no bias towards prompts whose
    scores are close. A group without variance gets 0. eps: TRL 1e-4, verl 1e-6. kept: as in `centred`.
    """
    _group_size(scores)
    differences = centred(scores, kept)
    if scale == "none":
        return differences
    if scale == "batch":
        counted = scores.flatten() if kept is None else scores[kept]
        return differences / (group_deviation(counted[None]) + eps) if counted.numel() > 1 else differences
    if scale == "group":
        return differences / (group_deviation(scores, kept) + eps)
    raise ConfigError(f"scale must be group, batch or none, got {scale!r}")


def group_deviation(scores: Tensor, kept: Tensor | None = None) -> Tensor:
    """The unbiased standard deviation of each prompt's scores, [P, 1]; 0 of one score or none."""
    squares = _above_mean(scores, kept).square().sum(-1, keepdim=True)
    count = torch.tensor(scores.shape[-1]) if kept is None else kept.sum(-1, keepdim=True)
    return (squares / (count - 1).clamp(min=1)).sqrt().to(_wide(scores))


def best_only(scores: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Pass@k: the best sample gets (s_1st - s_2nd) / (std + eps), every other 0. With a tie for the best all get 0."""
    _group_size(scores)
    scores = centred(scores)
    top = scores.topk(2, dim=-1)
    gap = (top.values[:, 0] - top.values[:, 1]) / (group_deviation(scores)[:, 0] + eps)
    return torch.zeros_like(scores).scatter(-1, top.indices[:, :1], gap[:, None])


def _group_size(scores: Tensor) -> int:
    if scores.dim() != 2 or scores.shape[1] < 2:
        raise TrainingError(
            f"a group baseline needs scores [prompts, n] with n of at least 2 samples per prompt, got "
            f"{tuple(scores.shape)}: set num_generations to 2 or more, or use ReMax, with the greedy answer as baseline"
        )
    return scores.shape[1]
