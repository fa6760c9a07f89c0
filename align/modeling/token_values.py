"""Log-prob, entropy and KL of next-token distributions from hidden states, never with all logits at once."""

from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from align.errors import ConfigError
from align.modeling.heads import Head, TokenValues, wide
from align.modeling.vocabulary_tiles import LARGE_TILE, tiled


def token_values(
    head: Head,
    hidden: Tensor,
    targets: Tensor,
    *,
    reference: tuple[Head, Tensor] | None = None,
    entropy: bool = False,
    entropy_gradient: bool = False,
    sum_squares: bool = False,
    chunk_size: int | None = None,
) -> TokenValues:
    """Values of `targets` [N] under head(hidden), hidden [N, d]. Differentiable in logps and kl,
    with `entropy_gradient` in the entropy too.

    Args:
        reference: head and hidden states [N, d'] of the reference: adds kl and ref_logps. It gets no gradient.
        chunk_size: the most tokens whose logits exist at once; None: as many as are fast.

    A token to which the reference gives probability 0 (a padded vocabulary with logits of -inf) adds nothing to the KL.
    """
    if reference and reference[0].vocabulary != head.vocabulary:
        raise ConfigError(
            f"the policy has {head.vocabulary} logits and the reference {reference[0].vocabulary}: a KL needs one "
            "vocabulary; resize the embeddings of one of them"
        )
    linear = head.weight is not None and (reference is None or reference[0].weight is not None)
    options = {"entropy": entropy, "entropy_gradient": entropy_gradient, "sum_squares": sum_squares}
    return (tiled if linear else _chunked)(head, hidden, targets, reference, options, chunk_size)


# ---- any head: chunks of tokens, each recomputed in the backward pass ------------------------------------------------


def _chunked(head: Head, hidden: Tensor, targets: Tensor, reference, options: dict, chunk_size: int | None):
    size = chunk_size or max(LARGE_TILE // head.vocabulary, 1)
    ref_head, *ref_hidden = reference or (None,)
    step = partial(_chunk_values, head, ref_head, **options)
    parts = [t.split(size) for t in (hidden, targets, *ref_hidden)]
    if len(parts[0]) > 1 and torch.is_grad_enabled():
        step = partial(checkpoint, step, use_reentrant=False)
    device = hidden.device.type
    # without its cache autocast casts the weights for every chunk, so that their gradients are summed in float32: the
    # chunks' gradients of one cast copy would be summed in bfloat16
    with torch.autocast(
        device,
        dtype=torch.get_autocast_dtype(device),
        enabled=torch.is_autocast_enabled(device),
        cache_enabled=False,
    ):
        logps, *others = zip(*[step(*chunk) for chunk in zip(*parts, strict=True)], strict=True)
    return TokenValues(torch.cat(logps), *[None if column[0] is None else torch.cat(column) for column in others])


def _chunk_values(
    head: Head, ref_head: Head | None, hidden, targets, ref_hidden=None, *, entropy, entropy_gradient, sum_squares
) -> tuple:
    log_p = head.transform(wide(head.forward(hidden))).log_softmax(-1)
    logps = log_p.gather(-1, targets[:, None]).squeeze(-1)
    kl = spread = log_squares = ref_logps = None
    if entropy_gradient:
        spread = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(-1)
    with torch.no_grad():
        if entropy and not entropy_gradient:
            spread = torch.special.entr(log_p.exp()).sum(-1)
        if sum_squares:
            log_squares = (2 * log_p).logsumexp(-1)
        if ref_head is not None:
            log_q = ref_head.transform(wide(ref_head.forward(ref_hidden))).log_softmax(-1)
            ref_logps = log_q.gather(-1, targets[:, None]).squeeze(-1)
    if ref_head is not None:
        q = log_q.exp()
        kl = torch.where(q > 0, q * (log_q - log_p), 0.0).sum(-1)
    return TokenValues(logps, kl, spread, log_squares, ref_logps)
