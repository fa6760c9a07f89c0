"""Attention over rows in which completions share one prefix, for models that use transformers' attention interface.

Such a row is made of groups: a prefix and what follows it in each sequence that begins with it (a *rest*; in a pair,
that of the chosen and that of the rejected sequence), group after group. A prefix token sees the prefix before it; a
token of a rest sees the whole prefix and its own rest before it. The attention mask is the table of these lengths,
[1, 1, groups, 1 + rests] integers, 0 where a group has fewer rests: transformers hands a mask of four dimensions to
each layer's attention function as it is, through wrappers and gradient checkpointing alike.

On GPUs the mask becomes a FlexAttention block mask; elsewhere each sequence is a call of SDPA, which costs no more than
its own tokens.
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
    output = group_by_group(query, key, value, _once(attention_mask, _segments), scale=scaling, dropout_p=dropout)
    return output.transpose(1, 2).contiguous(), None


def group_by_group(query: Tensor, key: Tensor, value: Tensor, segments: list, **options) -> Tensor:
    """[1, heads, N, d]. segments: of each group, the length of its prefix, and length and mask of each rest."""
    options["enable_gqa"] = query.shape[1] != key.shape[1]
    sizes = []
    for prefix, (first, *others) in segments:
        sizes += [prefix + first[0], *(length for length, _ in others)]
    pieces = zip(*(t.split(sizes, dim=2) for t in (query, key, value)), strict=True)
    outputs = []
    for prefix, (_, *others) in segments:
        q, k, v = next(pieces)  # the prefix and its first rest
        outputs.append(scaled_dot_product_attention(q, k, v, is_causal=True, **options))
        before = [t[:, :, :prefix] for t in (k, v)]
        for _, mask in others:
            q, *own = next(pieces)
            k, v = (torch.cat(both, dim=2) for both in zip(before, own, strict=True))
            outputs.append(scaled_dot_product_attention(q, k, v, attn_mask=mask, **options))
    return torch.cat(outputs, dim=2)


def block_mask(table: Tensor):
    """The FlexAttention mask of a table."""
    from torch.nn.attention.flex_attention import create_block_mask

    count = int(table.sum())
    return create_block_mask(visible(table), B=None, H=None, Q_LEN=count, KV_LEN=count, device=table.device)


def visible(table: Tensor) -> Callable[..., Tensor]:
    """Whether a query sees a key, by their positions in the row."""
    lengths = table.view(-1, table.shape[-1])
    part = torch.arange(lengths.shape[1], device=table.device).repeat(len(lengths))  # 0: the prefix
    part = part.repeat_interleave(lengths.flatten())
    group = torch.arange(len(lengths), device=table.device).repeat_interleave(lengths.sum(-1))

    def sees(batch, head, query, key):
        return (query >= key) & (group[query] == group[key]) & ((part[key] == 0) | (part[key] == part[query]))

    return sees


def _segments(table: Tensor) -> list[tuple[int, list[tuple[int, Tensor | None]]]]:
    segments = []
    for prefix, first, *others in table.view(-1, table.shape[-1]).tolist():
        rests = [(first, None)]
        for length in filter(None, others):
            mask = torch.ones(length, prefix + length, dtype=torch.bool, device=table.device)
            rests.append((length, mask.tril(prefix)))
        segments.append((prefix, rests))
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
