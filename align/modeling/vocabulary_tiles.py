"""`token_values` for linear heads, in tiles of the vocabulary.

A tile of logits lives in a buffer that every tile uses again, and the backward pass computes the tiles once more. That
costs one more product with the head, and saves writing and reading [tokens, vocabulary] tensors: on processors it is
the faster of the two.
"""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from align.modeling.heads import Head, LogitTransform, TokenValues, wide

CACHE_TILE = 1 << 21  # logits per tile on a processor: they stay in its cache
LARGE_TILE = 1 << 25  # elsewhere, where a launch costs more than the traffic: 128 MiB in float32
BLOCK = 4096  # tokens per tile, so that a tile is never a sliver of the vocabulary


def tiled(head: Head, hidden: Tensor, targets: Tensor, reference, options: dict, chunk_size: int | None):
    sides = [(hidden, head)] if reference is None else [(hidden, head), (reference[1].detach(), reference[0])]
    device = hidden.device.type
    tensors = [t for states, h in sides for t in (states, h.weight, h.bias)]
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    with torch.autocast(device, enabled=False):
        transforms = [h.transform for _, h in sides]
        return TokenValues(*_Tiled.apply(targets, transforms, options, chunk_size, dtype, *tensors))


class _Tiled(torch.autograd.Function):
    """The gradient of logit z_v, with p the policy, q the reference, g = dL/dlogp and k = dL/dKL:

    g (1[v = target] - p_v) + k (p_v - q_v)

    and with e = dL/dentropy (`entropy_gradient`) also e p_v (m - z_v), m the mean of z under p.

    It is summed in float32 before anything is rounded to the dtype of the products: at a token that the policy is sure
    of, g and g p differ by less than bfloat16 can tell. Each product with it is rounded once, and products are added up
    in float32, in one order.
    """

    @staticmethod
    def forward(ctx, targets, transforms, options, chunk_size, dtype, *tensors):
        ctx.set_materialize_grads(False)
        entropy_gradient, options = options["entropy_gradient"], {n: options[n] for n in ("entropy", "sum_squares")}
        sides = _sides(tensors, transforms, dtype)
        tiling = _Tiling(targets, sides[0].weight, chunk_size)
        blocks = [_block_values(sides, targets[rows], rows, tiling, **options) for rows in tiling.blocks]
        logps, *others = zip(*blocks, strict=True)
        columns = [None if column[0] is None else torch.cat(column) for column in others]
        values, normalisers = TokenValues(torch.cat(logps), *columns[:4]), columns[4:]
        ctx.transforms, ctx.chunk_size, ctx.dtype = transforms, chunk_size, dtype
        # as they came: what autocast makes of them is made again, rather than kept until then
        ctx.save_for_backward(targets, values.entropy if entropy_gradient else None, *normalisers, *tensors)
        ctx.mark_non_differentiable(*[t for t in values[3 if entropy_gradient else 2 :] if t is not None])
        return tuple(values)

    @staticmethod
    @once_differentiable
    def backward(ctx, g, k, e, *_):
        targets, entropy, top, total, ref_top, ref_total, *tensors = ctx.saved_tensors
        sides = _sides(tensors, ctx.transforms, ctx.dtype)
        policy, tiling = sides[0], _Tiling(targets, sides[0].weight, ctx.chunk_size)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[5:8]
        g = torch.zeros_like(top) if g is None else g
        normalisers = (top, total), (ref_top, ref_total)
        spread = None if e is None else (e, top + total.log() - entropy)
        d_hidden = torch.zeros_like(policy.hidden, dtype=top.dtype) if need_hidden else None
        d_weight = torch.empty_like(tensors[1]) if need_weight else None
        d_bias = torch.empty_like(tensors[2]) if need_bias else None
        for tile in tiling.tiles:
            weight = policy.weight[tile]
            tile_weight = None if d_weight is None else torch.zeros_like(weight, dtype=top.dtype)
            tile_bias = None if d_bias is None else top.new_zeros(len(weight))
            for rows in tiling.blocks:
                d = _logit_gradients(sides, rows, tile, tiling, targets, g, k, spread, normalisers)
                if tile_bias is not None:
                    tile_bias += d.sum(0)
                d = tiling.cast(d, weight.dtype, "gradient")
                if tile_weight is not None:
                    _add_product(tile_weight, d.T, policy.hidden[rows])
                if d_hidden is not None:
                    _add_product(d_hidden[rows], d, weight)
            if d_weight is not None and tile_weight is not None:
                d_weight[tile] = tile_weight
            if d_bias is not None and tile_bias is not None:
                d_bias[tile] = tile_bias
        if d_hidden is not None:
            d_hidden = d_hidden.to(tensors[0].dtype)
        return None, None, None, None, None, d_hidden, d_weight, d_bias, *[None] * (len(tensors) - 3)


def _logit_gradients(sides, rows, tile, tiling, targets, g, k, spread, normalisers) -> Tensor:
    """dL/d(product of the head) of a tile, [rows, tile], in a buffer. spread: None, or dL/dentropy and the mean logit
    under p."""
    (top, total), (ref_top, ref_total) = normalisers
    transform = sides[0].transform
    z = sides[0].logits(rows, tile, tiling, "policy")
    slope = transform.slope(z, out=tiling.like(z, "slope") if transform.cap else None)
    into_p = -g if k is None else k - g
    if spread is None:
        d = z.sub_(top[rows, None]).exp_().mul_((into_p / total)[rows, None])
    else:
        e, mean = (part[rows, None] for part in spread)
        # a logit of -inf has probability 0, and nothing of it is left
        above = torch.sub(mean, z, out=tiling.like(z, "above")).nan_to_num_(nan=torch.nan, posinf=0.0)
        above.mul_(e).add_(into_p[rows, None]).div_(total[rows, None])
        d = z.sub_(top[rows, None]).exp_().mul_(above)
    if k is not None:
        q = sides[1].logits(rows, tile, tiling, "reference").sub_(ref_top[rows, None]).exp_()
        d.sub_(q.mul_((k / ref_total)[rows, None]))
    columns = targets[rows] - tile.start
    inside, columns = (columns >= 0) & (columns < d.shape[1]), columns.clamp(0, d.shape[1] - 1)[:, None]
    d.scatter_(1, columns, d.gather(1, columns) + torch.where(inside, g[rows], 0.0)[:, None])
    if isinstance(slope, Tensor) or slope != 1.0:
        d.mul_(slope)
    return d


def _add_product(total: Tensor, first: Tensor, second: Tensor) -> None:
    """total += first @ second, the sum in the dtype of total."""
    if total.dtype == first.dtype:
        total.addmm_(first, second)
    else:
        total += first @ second


class _Side(NamedTuple):
    """Policy or reference."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    transform: LogitTransform

    def logits(self, rows: slice, tile: slice, tiling: "_Tiling", name: str) -> Tensor:
        """[rows, tile], float32 or float64, in buffers of this name."""
        hidden, weight = self.hidden[rows], self.weight[tile]
        out = tiling.buffer(name, weight.dtype, len(hidden), len(weight))
        products = tiling.cast(torch.mm(hidden, weight.T, out=out), wide(weight[:0]).dtype, name)
        if self.bias is not None:
            products.add_(self.bias[tile])  # here: in the dtype of the product it would be rounded a second time
        return self.transform.apply_(products)


def _sides(tensors, transforms, dtype: torch.dtype | None) -> list[_Side]:
    if dtype is not None:
        tensors = [t if t is None else t.to(dtype) for t in tensors]
    parts = zip(tensors[0::3], tensors[1::3], tensors[2::3], transforms, strict=True)
    return [_Side(hidden, weight, bias, transform) for hidden, weight, bias, transform in parts]


class _Tiling:
    """Slices of the tokens and of the vocabulary, and buffers for one tile each.

    Everything of a tile's size is written to a buffer: allocated anew for every tile, it would leave holes in the heap
    that the small results beside it keep from being used again.
    """

    def __init__(self, targets: Tensor, weight: Tensor, chunk_size: int | None):
        count, vocabulary = max(len(targets), 1), len(weight)
        rows = min(count, chunk_size or BLOCK)
        width = min(vocabulary, max((CACHE_TILE if weight.device.type == "cpu" else LARGE_TILE) // rows, 1))
        self.blocks = [slice(i, i + rows) for i in range(0, count, rows)]
        self.tiles = [slice(i, i + width) for i in range(0, vocabulary, width)]
        self.size, self.device = rows * width, weight.device
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def buffer(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        if (name, dtype) not in self.buffers:
            self.buffers[name, dtype] = torch.empty(self.size, dtype=dtype, device=self.device)
        return self.buffers[name, dtype][: shape[0] * shape[1]].view(shape)

    def like(self, values: Tensor, name: str) -> Tensor:
        return self.buffer(name, values.dtype, *values.shape)

    def cast(self, values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
        return values if values.dtype == dtype else self.buffer(name, dtype, *values.shape).copy_(values)


def _block_values(sides: list[_Side], targets: Tensor, rows: slice, tiling: _Tiling, entropy, sum_squares) -> tuple:
    """The fields of TokenValues, then largest logit and normaliser of policy and reference."""
    policy, reference = _Sums(), _Sums()
    at_target: Any = None  # there is a first tile
    ref_at_target: Any = None
    for tile in tiling.tiles:
        z = sides[0].logits(rows, tile, tiling, "policy")
        at_target = _at_targets(z, targets, tile, at_target)
        if len(sides) == 2:
            ref_z = sides[1].logits(rows, tile, tiling, "reference")
            ref_at_target = _at_targets(ref_z, targets, tile, ref_at_target)
            reference.add(ref_z, torch.sub(ref_z, z, out=tiling.like(z, "weighted")))
        policy.add(z, tiling.like(z, "weighted").copy_(z) if entropy else None, sum_squares)
    top, total, mean_logit, log_squares = policy.finish()
    logps, lse = (at_target - top) - total.log(), top + total.log()  # the first is exact to the end where p is near 1
    spread = None if mean_logit is None else lse - mean_logit
    if len(sides) == 1:
        return logps, None, spread, log_squares, None, top, total, None, None
    ref_top, ref_total, mean_difference, _ = reference.finish()
    kl = cast(Tensor, mean_difference) - (ref_top + ref_total.log()) + lse
    ref_logps = (ref_at_target - ref_top) - ref_total.log()
    return logps, kl, spread, log_squares, ref_logps, top, total, ref_top, ref_total


def _at_targets(logits: Tensor, targets: Tensor, tile: slice, before: Tensor | None) -> Tensor:
    columns = targets - tile.start
    here = logits.gather(-1, columns.clamp(0, logits.shape[-1] - 1)[:, None]).squeeze(-1)
    return here if before is None else torch.where((columns >= 0) & (columns < logits.shape[-1]), here, before)


class _Sums:
    """From tiles: max_v z_v; sum_v exp(z_v - max); the mean of x under p = softmax(z); log sum_v p_v^2."""

    def __init__(self):
        self.tops: list[Tensor] = []
        self.sums: list[Tensor] = []
        self.weighted: list[Tensor] = []
        self.squares: list[Tensor] = []

    def add(self, z: Tensor, x: Tensor | None, squares: bool = False) -> None:
        """Takes a tile of z and of x [N, v], and destroys both."""
        top = z.amax(-1, keepdim=True).clamp_(min=torch.finfo(z.dtype).min)
        weights = z.sub_(top).exp_()
        self.tops.append(top)
        self.sums.append(weights.sum(-1, keepdim=True))
        if x is not None:
            # 0 * inf and inf - inf: a token of probability 0 adds nothing
            x.mul_(weights).nan_to_num_(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
            self.weighted.append(x.sum(-1, keepdim=True))
        if squares:
            self.squares.append(weights.square_().sum(-1, keepdim=True))

    def finish(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        tops = torch.cat(self.tops, -1)
        top = tops.amax(-1, keepdim=True)
        scales = (tops - top).exp()
        total = (torch.cat(self.sums, -1) * scales).sum(-1)
        mean = (torch.cat(self.weighted, -1) * scales).sum(-1) / total if self.weighted else None
        squares = (torch.cat(self.squares, -1) * scales**2).sum(-1).log() - 2 * total.log() if self.squares else None
        return top.squeeze(-1), total, mean, squares
