"""Log-prob, entropy and KL of next-token distributions from hidden states, in tiles of the vocabulary.

A tile of logits lives in a buffer that every tile uses again, and the backward pass computes the tiles once more. That
costs one more product with the head, and saves writing and reading [tokens, vocabulary] tensors: on processors it is
the faster of the two.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from align.errors import ConfigError

CACHE_TILE = 1 << 21  # logits per tile on a processor: they stay in its cache
LARGE_TILE = 1 << 26  # elsewhere, where a launch costs more than the traffic: 256 MiB in float32
BLOCK = 4096  # tokens per tile, so that a tile is never a sliver of the vocabulary


class LogitTransform(NamedTuple):
    """What lies between the head's product and the logits: cap * tanh(scale * x / cap) / temperature."""

    scale: float = 1.0
    cap: float | None = None
    temperature: float = 1.0

    def __call__(self, products: Tensor) -> Tensor:
        if self.scale != 1.0:
            products = products * self.scale
        if self.cap:
            products = self.cap * torch.tanh(products / self.cap)
        return products / self.temperature if self.temperature != 1.0 else products

    def apply_(self, products: Tensor) -> Tensor:
        """The same in place."""
        if self.scale != 1.0:
            products.mul_(self.scale)
        if self.cap:
            products.div_(self.cap).tanh_().mul_(self.cap)
        return products.div_(self.temperature) if self.temperature != 1.0 else products

    def slope(self, logits: Tensor) -> Tensor | float:
        """d logit / d product, from the logit."""
        steepness = self.scale / self.temperature
        return steepness if not self.cap else steepness * (1 - (logits * (self.temperature / self.cap)) ** 2)


class Head(NamedTuple):
    """A language-model head. forward: hidden [N, d] -> products [N, vocabulary]; the logits are transform(products).

    weight [vocabulary, d], bias: of a plain linear layer, from which tiles of logits are computed; None for any other
    head (with an adapter, quantised), which is called on chunks of tokens.
    """

    forward: Callable[[Tensor], Tensor]
    vocabulary: int
    transform: LogitTransform = LogitTransform()
    weight: Tensor | None = None
    bias: Tensor | None = None


class TokenValues(NamedTuple):
    """[N] each, float32 (float64 from float64 logits); what was not asked for is None.

    logps: log p(target); kl: KL(ref || p), in nats. Without gradient: entropy of p, in nats; log_sum_squares: log of
    sum_v p(v)^2; ref_logps: log ref(target).
    """

    logps: Tensor
    kl: Tensor | None = None
    entropy: Tensor | None = None
    log_sum_squares: Tensor | None = None
    ref_logps: Tensor | None = None


def head_of(module: nn.Module, vocabulary: int, transform: LogitTransform) -> Head:
    """The head of a model, with its weights where nothing but they make its output."""
    plain = (
        type(module) is nn.Linear
        and type(module.weight) in (nn.Parameter, Tensor)  # neither sharded nor quantised
        and not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))
    )
    return Head(module.forward, vocabulary, transform, *((module.weight, module.bias) if plain else ()))


def token_values(
    head: Head,
    hidden: Tensor,
    targets: Tensor,
    *,
    reference: tuple[Head, Tensor] | None = None,
    entropy: bool = False,
    sum_squares: bool = False,
    chunk_size: int | None = None,
) -> TokenValues:
    """Values of `targets` [N] under head(hidden), hidden [N, d]. Differentiable in logps and kl.

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
    options = {"entropy": entropy, "sum_squares": sum_squares}
    return (_tiled if linear else _chunked)(head, hidden, targets, reference, options, chunk_size)


# ---- any head: chunks of tokens, each recomputed in the backward pass ------------------------------------------------


def _chunked(head: Head, hidden: Tensor, targets: Tensor, reference, options: dict, chunk_size: int | None):
    size = chunk_size or max(LARGE_TILE // head.vocabulary, 1)
    ref_head, ref_hidden = reference or (None, None)
    step = partial(_chunk_values, head, ref_head, **options)
    parts = [t.split(size) for t in (hidden, targets, *([] if reference is None else [ref_hidden]))]
    if len(parts[0]) > 1 and torch.is_grad_enabled():
        step = partial(checkpoint, step, use_reentrant=False)
    columns = zip(*[step(*chunk) for chunk in zip(*parts, strict=True)], strict=True)
    return TokenValues(*[None if column[0] is None else torch.cat(column) for column in columns])


def _chunk_values(
    head: Head, ref_head: Head | None, hidden, targets, ref_hidden=None, *, entropy, sum_squares
) -> tuple:
    log_p = head.transform(_wide(head.forward(hidden))).log_softmax(-1)
    logps = log_p.gather(-1, targets[:, None]).squeeze(-1)
    kl = spread = log_squares = ref_logps = None
    with torch.no_grad():
        if entropy:
            spread = torch.special.entr(log_p.exp()).sum(-1)
        if sum_squares:
            log_squares = (2 * log_p).logsumexp(-1)
        if ref_head is not None:
            log_q = ref_head.transform(_wide(ref_head.forward(ref_hidden))).log_softmax(-1)
            ref_logps = log_q.gather(-1, targets[:, None]).squeeze(-1)
    if ref_head is not None:
        q = log_q.exp()
        kl = torch.where(q > 0, q * (log_q - log_p), 0.0).sum(-1)
    return TokenValues(logps, kl, spread, log_squares, ref_logps)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


# ---- a linear head: tiles of the vocabulary --------------------------------------------------------------------------


def _tiled(head: Head, hidden: Tensor, targets: Tensor, reference, options: dict, chunk_size: int | None):
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
                z = sides[0].logits(rows, tile, tiling.buffer(0))
                slope = sides[0].transform.slope(z)
                d = z.sub_(lse[rows, None]).exp_().mul_(into_p[rows, None])
                if k is not None:
                    q = sides[1].logits(rows, tile, tiling.buffer(1)).sub_(ref_lse[rows, None]).exp_()
                    d.sub_(q.mul_(k[rows, None]))
                if isinstance(slope, Tensor) or slope != 1.0:
                    d.mul_(slope)
                if need_bias:
                    d_bias[tile] += d.sum(0)
                d = d.to(weight.dtype)
                if need_weight:
                    d_weight[tile].addmm_(
                        d.T, hidden[rows], beta=int(rows.start > 0)
                    )  # beta 0: what is there is not read
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

    def logits(self, rows: slice, tile: slice, buffer: Tensor) -> Tensor:
        """[rows, tile], in the buffer, or wider than it if the weights are in half precision."""
        hidden, weight = self.hidden[rows], self.weight[tile]
        products = torch.mm(hidden, weight.T, out=buffer[: len(hidden) * len(weight)].view(len(hidden), len(weight)))
        if self.bias is not None:
            products.add_(self.bias[tile])
        return self.transform.apply_(_wide(products))


def _sides(tensors, transforms) -> list[_Side]:
    return [_Side(*tensors[3 * i : 3 * i + 3], transform) for i, transform in enumerate(transforms)]


class _Tiling:
    """Slices of the tokens and of the vocabulary, and buffers for one tile each."""

    def __init__(self, targets: Tensor, weight: Tensor, chunk_size: int | None):
        count, vocabulary = max(len(targets), 1), len(weight)
        rows = min(count, chunk_size or BLOCK)
        width = min(vocabulary, max((CACHE_TILE if weight.device.type == "cpu" else LARGE_TILE) // rows, 1))
        self.blocks = [slice(i, i + rows) for i in range(0, count, rows)]
        self.tiles = [slice(i, i + width) for i in range(0, vocabulary, width)]
        self.new_buffer = partial(weight.new_empty, rows * width)
        self.buffers: dict[int, Tensor] = {}

    def buffer(self, name: int) -> Tensor:
        if name not in self.buffers:
            self.buffers[name] = self.new_buffer()
        return self.buffers[name]


def _block_values(sides: list[_Side], targets: Tensor, rows: slice, tiling: _Tiling, entropy, sum_squares) -> tuple:
    """The fields of TokenValues, then the target's logit and the logarithms of the two normalisers."""
    sums, at_targets = [_Sums() for _ in sides], [None for _ in sides]
    for tile in tiling.tiles:
        logits = [side.logits(rows, tile, tiling.buffer(i)) for i, side in enumerate(sides)]
        for i, z in enumerate(logits):
            at_targets[i] = _at_targets(z, targets, tile, at_targets[i])
        difference = logits[1] - logits[0] if len(sides) == 2 else None
        sums[0].add(logits[0], logits[0].clone() if entropy else None, sum_squares)
        if len(sides) == 2:
            sums[1].add(logits[1], difference)
    lse, mean_logit, log_squares = sums[0].finish()
    logps = at_targets[0] - lse
    spread = lse - mean_logit if entropy else None
    if len(sides) == 1:
        return logps, None, spread, log_squares, None, at_targets[0], lse, None
    ref_lse, mean_difference, _ = sums[1].finish()
    kl = mean_difference - ref_lse + lse
    return logps, kl, spread, log_squares, at_targets[1] - ref_lse, at_targets[0], lse, ref_lse


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
