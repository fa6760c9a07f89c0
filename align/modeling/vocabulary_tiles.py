"""`token_values` for linear heads, in tiles of the vocabulary.

A tile of logits lives in a buffer that every tile uses again, and the backward pass computes the tiles once more. That
costs one more product with the head, and saves writing and reading [tokens, vocabulary] tensors: on processors it is
the faster of the two.
"""

from typing import NamedTuple

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
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        tensors = [t if t is None else t.to(dtype) for t in tensors]
    with torch.autocast(device, enabled=False):
        return TokenValues(*_Tiled.apply(targets, [h.transform for _, h in sides], options, chunk_size, *tensors))


class _Tiled(torch.autograd.Function):
    """The gradient of logit z_v, with p the policy, q the reference, g = dL/dlogp and k = dL/dKL:

    g (1[v = target] - p_v) + k (p_v - q_v)
    """

    @staticmethod
    def forward(ctx, targets, transforms, options, chunk_size, *tensors):
        ctx.set_materialize_grads(False)
        sides, tiling = _sides(tensors, transforms), _Tiling(targets, tensors[1], chunk_size)
        blocks = [_block_values(sides, targets[rows], rows, tiling, **options) for rows in tiling.blocks]
        columns = [None if column[0] is None else torch.cat(column) for column in zip(*blocks, strict=True)]
        values, at_target, normalisers = TokenValues(*columns[:5]), columns[5], columns[6:]
        ctx.transforms, ctx.chunk_size = transforms, chunk_size
        ctx.save_for_backward(targets, at_target, *normalisers, *tensors)
        ctx.mark_non_differentiable(*[t for t in values[2:] if t is not None])
        return tuple(values)

    @staticmethod
    @once_differentiable
    def backward(ctx, g, k, *_):
        targets, at_target, lse, ref_lse, *tensors = ctx.saved_tensors
        sides, tiling = _sides(tensors, ctx.transforms), _Tiling(targets, tensors[1], ctx.chunk_size)
        hidden, weight, bias = tensors[:3]
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[4:7]
        g = torch.zeros_like(lse) if g is None else g
        into_p = -g if k is None else k - g
        d_hidden = torch.zeros_like(hidden, dtype=lse.dtype) if need_hidden else None
        d_weight = torch.empty_like(weight) if need_weight else None
        d_bias = torch.zeros_like(bias, dtype=lse.dtype) if need_bias else None
        for rows in tiling.blocks:
            for tile in tiling.tiles:
                z = sides[0].logits(rows, tile, tiling, "policy")
                slope = sides[0].transform.slope(z, out=tiling.like(z, "slope") if sides[0].transform.cap else None)
                d = z.sub_(lse[rows, None]).exp_().mul_(into_p[rows, None])
                if k is not None:
                    q = sides[1].logits(rows, tile, tiling, "reference").sub_(ref_lse[rows, None]).exp_()
                    d.sub_(q.mul_(k[rows, None]))
                if isinstance(slope, Tensor) or slope != 1.0:
                    d.mul_(slope)
                if need_bias:
                    d_bias[tile] += d.sum(0)
                d = tiling.cast(d, weight.dtype, "gradient")
                if need_weight:  # with beta 0 what is there is not read
                    d_weight[tile].addmm_(d.T, hidden[rows], beta=int(rows.start > 0))
                if need_hidden:
                    d_hidden[rows] += d @ weight[tile]
        one_hot = (g * sides[0].transform.slope(at_target))[:, None]
        if need_hidden:
            d_hidden = d_hidden.addcmul_(one_hot, weight[targets]).to(hidden.dtype)
        if need_weight:
            d_weight.index_add_(0, targets, (one_hot * hidden).to(weight.dtype))
        if need_bias:
            d_bias = d_bias.index_add_(0, targets, one_hot[:, 0]).to(bias.dtype)
        return None, None, None, None, d_hidden, d_weight, d_bias, *[None] * (len(tensors) - 3)


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
        products = torch.mm(hidden, weight.T, out=out)
        if self.bias is not None:
            products.add_(self.bias[tile])
        return self.transform.apply_(tiling.cast(products, wide(weight[:0]).dtype, name))


def _sides(tensors, transforms) -> list[_Side]:
    return [_Side(*tensors[3 * i : 3 * i + 3], transform) for i, transform in enumerate(transforms)]


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
    """The fields of TokenValues, then the target's logit and the logarithms of the two normalisers."""
    policy, reference = _Sums(), _Sums()
    at_target = ref_at_target = None
    for tile in tiling.tiles:
        z = sides[0].logits(rows, tile, tiling, "policy")
        at_target = _at_targets(z, targets, tile, at_target)
        if len(sides) == 2:
            ref_z = sides[1].logits(rows, tile, tiling, "reference")
            ref_at_target = _at_targets(ref_z, targets, tile, ref_at_target)
            reference.add(ref_z, torch.sub(ref_z, z, out=tiling.like(z, "weighted")))
        policy.add(z, tiling.like(z, "weighted").copy_(z) if entropy else None, sum_squares)
    lse, mean_logit, log_squares = policy.finish()
    logps = at_target - lse
    spread = lse - mean_logit if entropy else None
    if len(sides) == 1:
        return logps, None, spread, log_squares, None, at_target, lse, None
    ref_lse, mean_difference, _ = reference.finish()
    kl = mean_difference - ref_lse + lse
    return logps, kl, spread, log_squares, ref_at_target - ref_lse, at_target, lse, ref_lse


def _at_targets(logits: Tensor, targets: Tensor, tile: slice, before: Tensor | None) -> Tensor:
    places = targets - tile.start
    here = logits.gather(-1, places.clamp(0, logits.shape[-1] - 1)[:, None]).squeeze(-1)
    return here if before is None else torch.where((places >= 0) & (places < logits.shape[-1]), here, before)


class _Sums:
    """From tiles: log sum_v exp(z_v); the mean of x under p = softmax(z); log sum_v p_v^2."""

    def __init__(self):
        self.tops, self.sums, self.weighted, self.squares = [], [], [], []

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

    def finish(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        tops = torch.cat(self.tops, -1)
        top = tops.amax(-1, keepdim=True)
        scales = (tops - top).exp()
        total = (torch.cat(self.sums, -1) * scales).sum(-1)
        mean = (torch.cat(self.weighted, -1) * scales).sum(-1) / total if self.weighted else None
        squares = (torch.cat(self.squares, -1) * scales**2).sum(-1).log() - 2 * total.log() if self.squares else None
        return top.squeeze(-1) + total.log(), mean, squares
