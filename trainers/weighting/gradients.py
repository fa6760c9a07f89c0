"""The policy gradient of each stream by itself, for weightings that learn from it."""

import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from align.errors import ConfigError
from align.modeling.completions import completion_logps
from align.objectives.policy_loss import aggregate_tokens
from align.trainers.core.ranks import Ranks


def gradient_parameters(model: nn.Module, pattern: str, ranks: Ranks) -> list[nn.Parameter]:
    """The trained parameters whose name has the regular expression; ConfigError where gradients cannot be taken."""
    if ranks.sharded:
        raise ConfigError("dynamic_weights of type gradient works with DDP or in one process: it needs whole gradients")
    chosen = [p for name, p in model.named_parameters() if p.requires_grad and re.search(pattern, name)]
    if not chosen:
        raise ConfigError(f"dynamic_weights.parameters: no trained parameter's name has {pattern!r}")
    return chosen


def stream_gradients(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    streams: list[int],
    parameters: list[nn.Parameter],
    *,
    temperature: float,
    aggregation: str,
    count: Tensor,
    ranks: Ranks,
) -> Tensor:
    """The gradient of the loss of every stream on the global rollout, [streams, parameters], float32.

    batches: this process's micro-batches, with `advantages` [B, L, S]. streams: the columns that are wanted. count:
    what the loss is divided by, over all processes.
    """
    total = torch.zeros(len(streams), sum(p.numel() for p in parameters), device=parameters[0].device)
    for batch in batches:
        logps, mask = completion_logps(model, batch, temperature=temperature), batch["completion_mask"]
        for row, stream in enumerate(streams):
            loss = aggregate_tokens(-batch["advantages"][..., stream] * logps, mask, aggregation, count)
            more = row < len(streams) - 1
            found = torch.autograd.grad(loss, parameters, retain_graph=more, allow_unused=True)
            flat = [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]
            total[row] += torch.cat([g.flatten() for g in flat]).float()
    return ranks.sum(total)
