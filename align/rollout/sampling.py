"""Drawing tokens when every row of a batch has its own parameters."""

import numpy as np
import torch
from torch import Tensor

from align.rollout.types import SamplingParams

BLOCK = 128  # tokens: a divisor of most vocabularies, near the square root of a large one
BELOW_ONE = 1 - 2**-53


def processed_logps(
    logits: Tensor, temperature: Tensor | None, top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None = None
) -> Tensor:
    """log-probs [B, V] of the distribution that is drawn from; `logits` [B, V] float, the rest [B] or None (off).

    As in vLLM: temperature first, then without the tokens that are less likely than `min_p` times the most likely one,
    then the `top_k` most likely tokens, then of what is left the smallest set whose probability reaches `top_p`; what
    remains is renormalised. A row with top_k = V, top_p = 1 or min_p = 0 is not cut.
    """
    if temperature is not None:
        logits = logits / temperature[:, None]
    if min_p is not None:
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + min_p.log()[:, None], -torch.inf)
    if top_k is not None or top_p is not None:
        ordered, order = logits.sort(dim=-1, descending=True)
        if top_k is not None:
            places = torch.arange(ordered.shape[-1], device=ordered.device)
            ordered = ordered.masked_fill(places >= top_k[:, None], -torch.inf)
        if top_p is not None:
            probs = ordered.softmax(-1)
            before = probs.cumsum(-1) - probs
            ordered = ordered.masked_fill((before >= top_p[:, None]) & (top_p < 1)[:, None], -torch.inf)
        logits = torch.empty_like(ordered).scatter_(-1, order, ordered)
    return logits.log_softmax(-1)


def penalised(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Logits [B, V] in which tokens that were there before are less likely, as in vLLM and transformers: divided by the
    penalty if positive, else multiplied. seen: [B, V] bool. penalty: [B]."""
    changed = torch.where(logits > 0, logits / penalty[:, None], logits * penalty[:, None])
    return torch.where(seen, changed, logits)


def draw_tokens(logps: Tensor, uniforms: Tensor) -> Tensor:
    """Tokens [B] drawn from log-probs [B, V] with one uniform number in [0, 1) per row, `uniforms` [B] float64.

    The inverse of the distribution function: first the block of the vocabulary, then the token in it. Running sums over
    all of a large vocabulary, in float64 because float32 loses its tail, took longer than all else of a draw.
    """
    size = logps.shape[-1]
    weights = logps.new_empty(len(logps), -(-size // BLOCK) * BLOCK)
    weights[:, size:] = 0.0
    torch.exp(logps, out=weights[:, :size])
    blocks = weights.view(len(logps), -1, BLOCK)
    block, uniforms = _draw(blocks.sum(-1), uniforms)
    token, _ = _draw(blocks[torch.arange(len(block), device=block.device), block], uniforms)
    return (block * BLOCK + token).clamp(max=size - 1)


def _draw(weights: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Indices [B] in proportion to weights [B, N], and where each number lies in the share of what it drew, in [0, 1):
    a uniform number again."""
    cdf = weights.cumsum(-1, dtype=torch.float64)
    points = uniforms[:, None] * cdf[:, -1:]
    index = torch.searchsorted(cdf, points, right=True).clamp(max=weights.shape[-1] - 1)
    share = weights.gather(-1, index).double()
    inside = (points - (cdf.gather(-1, index) - share)) / share
    return index.squeeze(-1), inside.clamp(0.0, BELOW_ONE).squeeze(-1)


class RowSampler:
    """Draws one token per row and step. A row's draws depend on its own seed alone, not on its neighbours."""

    def __init__(
        self,
        params: list[SamplingParams],
        seeds: list[int | None],
        stop_ids: list[tuple[int, ...]],
        vocab_size: int,
        device: torch.device,
        prompts: list[list[int]] | None = None,
    ):
        """prompts: what a repetition penalty counts beside the completions."""
        self.params, self.stop_ids = params, stop_ids
        tensor = lambda values: torch.tensor(values, device=device)  # noqa: E731
        self.greedy = tensor([p.greedy for p in params])
        self.any_greedy = any(p.greedy for p in params)
        temperatures = [p.temperature or 1.0 for p in params]
        self.temperature = tensor(temperatures) if any(t != 1 for t in temperatures) else None
        self.top_k = tensor([p.top_k or vocab_size for p in params]) if any(p.top_k for p in params) else None
        self.top_p = tensor([p.top_p for p in params]) if any(p.top_p < 1 for p in params) else None
        self.min_p = tensor([p.min_p for p in params]) if any(p.min_p for p in params) else None
        uniforms = np.zeros((len(params), max(p.max_tokens for p in params)))
        for row, (own, seed) in enumerate(zip(params, seeds, strict=True)):
            if seed is not None:
                uniforms[row, : own.max_tokens] = np.random.default_rng(seed).random(own.max_tokens)
        self.uniforms = torch.from_numpy(uniforms).to(device)
        self.penalty = tensor([p.repetition_penalty for p in params]) if any(p.penalises for p in params) else None
        self.seen: Tensor | None = None  # [B, V]: the tokens that a row has already
        if self.penalty is not None:
            self.seen = torch.zeros(len(params), vocab_size, dtype=torch.bool, device=device)
            for row, ids in enumerate(prompts or []):
                self.seen[row, ids] = True
        self.min_tokens = max(p.min_tokens for p in params)

    def select(self, rows: list[int]) -> None:
        """Keep only these rows."""
        self.params = [self.params[i] for i in rows]
        self.stop_ids = [self.stop_ids[i] for i in rows]
        for name in ("greedy", "temperature", "top_k", "top_p", "min_p", "uniforms", "penalty", "seen"):
            if (values := getattr(self, name)) is not None:
                setattr(self, name, values[rows])

    def draw(self, logits: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Tokens [B] and their log-probs [B] from logits [B, V]; `step` counts the tokens drawn before."""
        if step < self.min_tokens:
            for row, params in enumerate(self.params):
                if step < params.min_tokens:
                    logits[row, list(self.stop_ids[row])] = -torch.inf
        if self.penalty is not None and self.seen is not None:
            logits = penalised(logits, self.seen, self.penalty)
        logps = processed_logps(logits, self.temperature, self.top_k, self.top_p, self.min_p)
        tokens = draw_tokens(logps, self.uniforms[:, step])
        if self.any_greedy:
            tokens = torch.where(self.greedy, logits.argmax(-1), tokens)
        if self.seen is not None:
            self.seen.scatter_(1, tokens[:, None], True)
        return tokens, logps.gather(-1, tokens[:, None]).squeeze(-1)
