"""The proof that an engine holds the trainer's weights: the same tokens must get the same log-probs on both sides."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch

from align.errors import ConfigError
from align.modeling.logprobs import language_model, token_logps
from align.modeling.types import Model
from align.rollout.types import Completion, Request, SamplingParams

TEMPERATURE = 0.7  # not 1: an engine that returns log-probs without the temperature must fail the probe too
TOKENS = 12
PROMPT_LENGTHS = (3, 24, 150)  # 150: longer than a block of the prefix cache (32 tokens on CPUs, 16 on GPUs)

# Measured between engine and trainer on Llamas of 4 layers, width 256, weights N(0, s^2), s = 0.05 and 0.1: float32
# 4e-6 and 1e-5, bfloat16 0.06 and 0.4, float16 0.009 and 0.1, with both back-ends (a usual initialisation: s = 0.02).
# So in half precision the probe sees only gross differences: other weights altogether differ by 1 and more.
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.1}


@dataclass(frozen=True)
class Probe:
    """Differences of log-probs in nats, engine against trainer, over `tokens` generated tokens."""

    max_abs_diff: float
    mean_abs_diff: float
    tokens: int


def default_tolerance(dtype: torch.dtype) -> float:
    if dtype not in TOLERANCE:
        raise ConfigError(f"rollouts do not run {dtype} models: load the model in float32, bfloat16 or float16")
    return TOLERANCE[dtype]


def probe_requests(vocab_size: int, max_model_len: int) -> list[Request]:
    """Fixed pseudo-random prompts, sampled with fixed seeds and without end tokens, so that none ends early."""
    new = min(TOKENS, max_model_len - 1)
    generator = torch.Generator().manual_seed(0)
    requests = []
    for index, length in enumerate(PROMPT_LENGTHS):
        ids = torch.randint(vocab_size, (min(length, max_model_len - new),), generator=generator).tolist()
        params = SamplingParams(max_tokens=new, temperature=TEMPERATURE)
        requests.append(Request(ids, params, seed=index, stop_ids=()))
    return requests


def compare(model: Model, requests: list[Request], completions: list[list[Completion]]) -> Probe:
    """The engine's log-probs of `completions` against the model's own for the same tokens and temperature."""
    sequences = [r.prompt_ids + group[0].token_ids for r, group in zip(requests, completions, strict=True)]
    width = max(map(len, sequences))
    device = language_model(model).device
    input_ids = torch.zeros(len(sequences), width, dtype=torch.long, device=device)
    attention_mask, completion_mask = torch.zeros_like(input_ids), torch.zeros_like(input_ids)
    for row, (ids, request) in enumerate(zip(sequences, requests, strict=True)):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        attention_mask[row, : len(ids)] = 1
        completion_mask[row, len(request.prompt_ids) : len(ids)] = 1
    with plain_forward(model), torch.no_grad():
        logps = token_logps(model, input_ids, attention_mask, temperature=TEMPERATURE, mask=completion_mask)
    ours = torch.tensor([x for group in completions for x in cast(list[float], group[0].logprobs)], dtype=torch.float64)
    theirs = logps[completion_mask[:, 1:].bool()].double().cpu()
    difference = (ours - theirs).abs()
    return Probe(difference.max().item(), difference.mean().item(), difference.numel())


@contextmanager
def plain_forward(model: Model) -> Iterator[None]:
    """The model without dropout and mixed precision, for as long as the context lasts.

    accelerate hangs an autocast wrapper on the prepared model's `forward`: through it, float32 weights would give
    bfloat16 log-probs, and the probe could not tell them from stale ones.
    """
    modes = [(module, module.training) for module in model.modules()]
    wrapped = {m: m.__dict__.pop("forward") for m, _ in modes if {"_original_forward", "forward"} <= m.__dict__.keys()}
    try:
        model.eval()
        with torch.autocast(language_model(model).device.type, enabled=False):
            yield
    finally:
        for module, forward in wrapped.items():
            module.forward = forward
        for module, training in modes:
            module.training = training
