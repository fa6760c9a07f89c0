"""Attention over rows in which two completions share one prefix, for models that use transformers' attention interface.

Such a row is made of pairs: prefix, rest of the chosen sequence, rest of the rejected one, pair after pair. A prefix
token sees the prefix before it; a token of a rest sees the whole prefix and its own rest before it. The attention mask
is the table of these lengths, [1, 1, pairs, 3] integers: transformers hands a mask of four dimensions to each layer's
attention function as it is, through wrappers and gradient checkpointing alike.

On GPUs the mask becomes a FlexAttention block mask; elsewhere each pair is two calls of SDPA, which cost no more than
the pair's own tokens.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.weak import WeakTensorKeyDictionary

from align.errors import TrainingError

IMPLEMENTATION = "sdpa_shared_prefix"
_prepared: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # one table serves all layers


def register() -> None:
    """Make `IMPLEMENTATION` known to transformers: SDPA, which also takes such a table as its mask."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(IMPLEMENTATION, attention)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, None]:
    """An attention function of transformers. query [1, heads, N, d], key and value [1, key heads, N, d]."""
    if attention_mask is None or attention_mask.dtype not in (torch.int32, torch.int64):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    _check(attention_mask, kwargs)
    if query.is_cuda:
        from transformers.integrations.flex_attention import flex_attention_forward

        mask = _once(attention_mask, block_mask)
        output, _ = flex_attention_forward(module, query, key, value, mask, scaling=scaling, dropout=dropout)
        return output, None
    output = pair_by_pair(query, key, value, _once(attention_mask, _segments), scale=scaling, dropout_p=dropout)
    return output.transpose(1, 2).contiguous(), None


def pair_by_pair(query: Tensor, key: Tensor, value: Tensor, segments: list, **options) -> Tensor:
    """[1, heads, N, d]. segments: of each pair, the lengths (prefix, chosen, rejected) and the mask of the rejected."""
    options["enable_gqa"] = query.shape[1] != key.shape[1]
    sizes = [size for (prefix, chosen, rejected), _ in segments for size in (prefix + chosen, rejected)]
    queries, keys, values = (t.split(sizes, dim=2) for t in (query, key, value))
    outputs = []
    for i, ((prefix, _, _), mask) in enumerate(segments):
        q, k, v = queries[2 * i], keys[2 * i], values[2 * i]
        outputs.append(scaled_dot_product_attention(q, k, v, is_causal=True, **options))
        q, *own = queries[2 * i + 1], keys[2 * i + 1], values[2 * i + 1]
        k, v = (torch.cat([t[:, :, :prefix], rest], dim=2) for t, rest in zip((k, v), own, strict=True))
        outputs.append(scaled_dot_product_attention(q, k, v, attn_mask=mask, **options))
    return torch.cat(outputs, dim=2)


def block_mask(table: Tensor):
    """The FlexAttention mask of a table."""
    from torch.nn.attention.flex_attention import create_block_mask

    count = int(table.sum())
    return create_block_mask(visible(table), B=None, H=None, Q_LEN=count, KV_LEN=count, device=table.device)


def visible(table: Tensor) -> Callable[..., Tensor]:
    """Whether a query sees a key, by their positions in the row."""
    lengths = table.view(-1, 3)
    part = torch.arange(3, device=table.device).repeat(len(lengths))  # 0 prefix, 1 chosen, 2 rejected
    part = part.repeat_interleave(lengths.flatten())
    pair = torch.arange(len(lengths), device=table.device).repeat_interleave(lengths.sum(-1))

    def sees(batch, head, query, key):
        return (query >= key) & (pair[query] == pair[key]) & ((part[key] == 0) | (part[key] == part[query]))

    return sees


def _segments(table: Tensor) -> list[tuple[list[int], Tensor]]:
    segments = []
    for lengths in table.view(-1, 3).tolist():
        prefix, _, rejected = lengths
        mask = torch.ones(rejected, prefix + rejected, dtype=torch.bool, device=table.device)
        segments.append((lengths, mask.tril(prefix)))
    return segments


def _once(table: Tensor, make):
    if table not in _prepared:
        _prepared[table] = make(table)
    return _prepared[table]


def _check(table: Tensor, kwargs: dict) -> None:
    window = kwargs.get("sliding_window")
    longest = int((table[..., 0] + table[..., 1:].amax(-1)).max()) if window else 0
    if window and longest > window:
        raise TrainingError(
            f"a sequence of {longest} tokens is longer than the model's attention window of {window}: shared prefixes "
            "cannot be used; train on padded batches, or lower max_length"
        )
    if kwargs.get("position_bias") is not None:
        raise TrainingError("a model with position biases cannot take shared prefixes; train on padded batches")
