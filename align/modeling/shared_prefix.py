"""Attention over rows in which completions share one prefix, for models that use transformers' attention interface.

Such a row is made of groups: a prefix and what follows it in each sequence that begins with it (a *rest*; in a pair,
that of the chosen and that of the rejected sequence), group after group. A prefix token sees the prefix before it; a
token of a rest sees the whole prefix and its own rest before it. The attention mask is the table of these lengths,
[1, 1, groups, 1 + rests] integers, 0 where a group has fewer rests: transformers hands a mask of four dimensions to
each layer's attention function as it is, through wrappers and gradient checkpointing alike.

On GPUs the mask becomes a FlexAttention block mask; elsewhere each sequence is a call of SDPA, which costs no more than
its own tokens. Soft-capped scores (Gemma-2), which SDPA does not know, are computed as such in either layout.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, cast
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.weak import WeakTensorKeyDictionary

from align.errors import TrainingError
from align.modeling.types import Model

IMPLEMENTATION = "shared_prefix"  # not "sdpa...": transformers would refuse it where it refuses its own SDPA
BLOCK = 128  # FlexAttention's blocks, in tokens
COMPILATIONS = 64  # of FlexAttention, for shapes of models, dtypes and passes, in one process
_prepared: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # one table serves all layers
_called: WeakSet[nn.Module] = WeakSet()  # layers' attention modules that were given a table


def register() -> None:
    """Make `IMPLEMENTATION` known to transformers: SDPA, which also takes such a table as its mask."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(IMPLEMENTATION, attention)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


def took_a_table(module: nn.Module) -> bool:
    """Whether this is an attention module that has been given a table as its mask."""
    return module in _called


def compute_soft_caps(core: Model, chosen: str | None = None) -> None:
    """Have a model with soft-capped attention scores (Gemma-2) compute them in SDPA. transformers' own SDPA leaves the
    cap out; its releases that say so (5.23) take eager attention, unless told otherwise, in which such models cannot
    share prefixes. chosen: the attention that was asked for; eager stays."""
    capped = vars(core.config.get_text_config()).get("attn_logit_softcapping")
    by_default = "sdpa" if core._supports_sdpa else "eager"
    if capped is not None and chosen != "eager" and core.config._attn_implementation in ("sdpa", by_default):
        register()
        core.set_attn_implementation(IMPLEMENTATION)


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
    softcap = kwargs.get("softcap")
    if attention_mask is None or attention_mask.dtype not in (torch.int32, torch.int64):
        if softcap is not None:
            causal = attention_mask is None and query.shape[2] > 1
            options: dict[str, Any] = {
                "attn_mask": attention_mask,
                "is_causal": causal,
                "scale": scaling,
                "dropout_p": dropout,
            }
            return soft_capped(query, key, value, softcap=softcap, **options).transpose(1, 2).contiguous(), None
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    _check(attention_mask, kwargs)
    _called.add(module)
    query, key, value = _of_one_dtype(query, key, value)
    if query.is_cuda and dropout == 0:  # FlexAttention has no dropout
        mask = _once(attention_mask, block_mask, query.shape[2])
        output = flex(query, key, value, mask, scale=scaling, softcap=softcap)
    else:
        segments = _once(attention_mask, _segments)
        output = group_by_group(query, key, value, segments, scale=scaling, dropout_p=dropout, softcap=softcap)
    return output.transpose(1, 2).contiguous(), None


def _of_one_dtype(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """Rotary embeddings leave queries and keys in float32 under autocast, which casts SDPA's inputs and no others."""
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
    return query.to(dtype), key.to(dtype), value.to(dtype)


def group_by_group(
    query: Tensor, key: Tensor, value: Tensor, segments: list, *, softcap: float | None = None, **options
) -> Tensor:
    """[1, heads, N, d]. segments: of each group, the length of its prefix, and length and mask of each rest."""
    attend: Callable[..., Tensor]
    if softcap is not None:
        attend, options = soft_capped, {**options, "softcap": softcap}
    else:
        attend, options = scaled_dot_product_attention, {**options, "enable_gqa": query.shape[1] != key.shape[1]}
    sizes = []
    for prefix, (first, *others) in segments:
        sizes += [prefix + first[0], *(length for length, _ in others)]
    pieces = zip(*(t.split(sizes, dim=2) for t in (query, key, value)), strict=True)
    outputs = []
    for prefix, (_, *others) in segments:
        q, k, v = next(pieces)  # the prefix and its first rest
        outputs.append(attend(q, k, v, is_causal=True, **options))
        before = [t[:, :, :prefix] for t in (k, v)]
        for _, mask in others:
            q, *own = next(pieces)
            k, v = (torch.cat(both, dim=2) for both in zip(before, own, strict=True))
            outputs.append(attend(q, k, v, attn_mask=mask, **options))
    return torch.cat(outputs, dim=2)


def soft_capped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    softcap: float,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """SDPA with scores softcap * tanh(score / softcap), all of them at once: [B, heads, Q, d].

    query: [B, heads, Q, d]; key, value: [B, key heads, K, d]; attn_mask: [.., Q, K], bool (seen) or added to scores.
    """
    repeats = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(repeats, dim=1) if repeats > 1 else t for t in (key, value))
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = softcap * torch.tanh(scores / softcap)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min)
    elif attn_mask is not None:
        scores = scores + attn_mask
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    return nn.functional.dropout(weights, dropout_p) @ value


# ---- FlexAttention ---------------------------------------------------------------------------------------------------


def flex(query: Tensor, key: Tensor, value: Tensor, mask, *, scale: float | None, softcap: float | None) -> Tensor:
    """[1, heads, N, d]. Keys are shared within the groups of query heads, whatever their number."""
    from torch.nn.attention.flex_attention import flex_attention

    options = {"block_mask": mask, "scale": scale, "enable_gqa": query.shape[1] != key.shape[1]}
    if not query.is_cuda or torch.compiler.is_compiling():
        return cast(Tensor, flex_attention(query, key, value, _cap(softcap), **options))
    # Policy, reference, critic and reward models, with and without gradients, are compiled for one by one. Beyond
    # PyTorch's limit of eight it would go on uncompiled, which makes all N^2 scores.
    with torch._dynamo.config.patch(recompile_limit=COMPILATIONS, fail_on_recompile_limit_hit=True):
        return cast(Tensor, _compiled_flex()(query, key, value, _cap(softcap), **options))


@cache
def _compiled_flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


@cache  # one function per cap, so that a compiled kernel is found again
def _cap(softcap: float | None) -> Callable | None:
    if softcap is None:
        return None

    def capped(score, batch, head, query, key):
        return softcap * torch.tanh(score / softcap)

    return capped


def block_mask(table: Tensor, count: int | None = None):
    """The FlexAttention mask of a table, from its lengths: O(rests * N/BLOCK + (N/BLOCK)^2) memory.

    How many pairs of positions of a block see each other is a sum over rectangles (rests see prefixes) and
    triangles (prefixes and rests see themselves), that is a product of [segments, N/BLOCK] matrices. Equal to what
    `create_block_mask` makes of `visible`, for which that needs 10 N^2 bytes. With `count` (the tokens N), the device
    is not waited for.
    """
    from torch.nn.attention.flex_attention import BlockMask

    count = int(table.sum()) if count is None else count
    lengths = table.view(-1, table.shape[-1])
    ends = lengths.flatten().cumsum(0).view_as(lengths)
    edges = torch.arange(0, count, BLOCK, device=table.device)
    # how many tokens of each segment [groups, 1 + rests] lie in each block
    inside = torch.minimum(ends[..., None], edges + BLOCK) - torch.maximum((ends - lengths)[..., None], edges)
    inside = inside.clamp(min=0).float()  # counts up to BLOCK^2 are exact in float32
    prefixes, rests, segments = inside[:, 0], inside[:, 1:].sum(1), inside.flatten(0, 1)
    whole = rests.T @ prefixes + segments.T @ segments
    own = (rests * prefixes).sum(0) + (segments * (segments + 1) / 2).sum(0)
    seen = whole.tril(-1) + own.diag()
    full = seen == BLOCK**2
    blocks = [_ordered(kind[None, None]) for kind in ((seen > 0) & ~full, full)]
    return BlockMask.from_kv_blocks(
        *blocks[0], *blocks[1], BLOCK_SIZE=BLOCK, mask_mod=visible(table, count), seq_lengths=(count, count)
    )


def _ordered(dense: Tensor) -> tuple[Tensor, Tensor]:
    """Number and indices of the key blocks of each query block, those that are in front."""
    return dense.sum(-1, dtype=torch.int32), dense.int().argsort(dim=-1, descending=True, stable=True).int()


def visible(table: Tensor, count: int | None = None) -> Callable[..., Tensor]:
    """Whether a query sees a key, by their positions in the row."""
    lengths = table.view(-1, table.shape[-1])
    part = torch.arange(lengths.shape[1], device=table.device).repeat(len(lengths))  # 0: the prefix
    part = part.repeat_interleave(lengths.flatten(), output_size=count)
    group = torch.arange(len(lengths), device=table.device).repeat_interleave(lengths.sum(-1), output_size=count)

    def sees(batch, head, query, key):
        return (query >= key) & (group[query] == group[key]) & ((part[key] == 0) | (part[key] == part[query]))

    return sees


# ---- the table -------------------------------------------------------------------------------------------------------


def _segments(table: Tensor) -> list[tuple[int, list[tuple[int, Tensor | None]]]]:
    segments = []
    for prefix, first, *others in table.view(-1, table.shape[-1]).tolist():
        rests: list[tuple[int, Tensor | None]] = [(first, None)]
        for length in filter(None, others):
            mask = torch.ones(length, prefix + length, dtype=torch.bool, device=table.device)
            rests.append((length, mask.tril(prefix)))
        segments.append((prefix, rests))
    return segments


def _once(table: Tensor, make: Callable, *inputs):
    made = _prepared.setdefault(table, {})
    if make not in made:
        made[make] = make(table, *inputs)
    return made[make]


def _longest(table: Tensor) -> int:
    return int((table[..., 0] + table[..., 1:].amax(-1)).max())


def _check(table: Tensor, kwargs: dict) -> None:
    window = kwargs.get("sliding_window")
    if window and _once(table, _longest) > window:
        raise TrainingError(
            f"a sequence of {_once(table, _longest)} tokens is longer than the model's attention window of {window}: "
            "shared prefixes cannot be used; train on padded batches, or lower max_length"
        )
    for name, what in (("position_bias", "position biases"), ("s_aux", "attention sinks")):
        if kwargs.get(name) is not None:
            raise TrainingError(f"a model with {what} cannot take shared prefixes; train on padded batches")
