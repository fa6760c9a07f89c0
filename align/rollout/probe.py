"""Whether an engine computes what the trainer computes: log-probs of the same tokens on both sides.

Weights are proved bit by bit (`align.rollout.identity`); this finds what they cannot show: another temperature, other
positions, another implementation of the model. In half precision two correct implementations differ by as much as their
rounding, which depends on the model: so it is measured, on the trainer's own model.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from align.errors import RolloutError
from align.modeling.dropout import without_dropout
from align.modeling.logprobs import language_model, token_logps
from align.modeling.text_part import unreached
from align.modeling.types import Model
from align.rollout.types import Completion, Request, SamplingParams

logger = logging.getLogger(__name__)

TEMPERATURE = 0.7  # not 1: an engine that returns log-probs without the temperature must fail the probe too
TOKENS = 12
PROMPT_LENGTHS = (3, 24, 150)  # 150: longer than a block of the prefix cache (32 tokens on CPUs, 16 on GPUs)

# Times the mean difference that rounding makes. Healthy bfloat16 engines were measured at 0.5 to 2.6 (vLLM on CPUs).
WARN, FAIL = 4.0, 8.0
FLOOR = 1e-4  # nats; below it no difference matters


@dataclass(frozen=True)
class Probe:
    """Differences of log-probs in nats, engine against trainer, over `tokens` generated tokens.

    rounding: the mean difference that a rounding in every layer makes, on the trainer's side alone.
    """

    mean_abs_diff: float
    median_abs_diff: float
    p90_abs_diff: float
    max_abs_diff: float
    rounding: float
    tokens: int


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


def compare(model: Model, requests: list[Request], completions: list[list[Completion]], dtype: torch.dtype) -> Probe:
    """The engine's log-probs of `completions` against the model's own for the same tokens and temperature.

    The model computes as it does in training (mixed precision and all), but without dropout. dtype: the engine's.
    """
    sequences = [r.prompt_ids + group[0].token_ids for r, group in zip(requests, completions, strict=True)]
    width = max(map(len, sequences))
    device = language_model(model).device
    input_ids = torch.zeros(len(sequences), width, dtype=torch.long, device=device)
    attention_mask, completion_mask = torch.zeros_like(input_ids), torch.zeros_like(input_ids)
    for row, (ids, request) in enumerate(zip(sequences, requests, strict=True)):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        attention_mask[row, : len(ids)] = 1
        completion_mask[row, len(request.prompt_ids) : len(ids)] = 1

    def own_logps() -> Tensor:
        logps = token_logps(model, input_ids, attention_mask, temperature=TEMPERATURE, mask=completion_mask)
        return logps[completion_mask[:, 1:].bool()].double().cpu()

    ours = torch.tensor([x for group in completions for x in cast(list[float], group[0].logprobs)], dtype=torch.float64)
    with without_dropout(model), torch.no_grad():
        theirs = own_logps()
        with rounded_layers(language_model(model), dtype):
            rounded = own_logps()
    gaps = (ours - theirs).abs()
    median, p90 = torch.quantile(gaps, torch.tensor([0.5, 0.9], dtype=torch.float64)).tolist()
    rounding = (rounded - theirs).abs().mean().item()
    return Probe(gaps.mean().item(), median, p90, gaps.max().item(), rounding, gaps.numel())


def check_probe(probe: Probe, engine: str, version: int, tolerance: float | None) -> None:
    """tolerance: the largest mean difference, in nats, that is accepted; None: what rounding explains."""
    limit = max(FAIL * probe.rounding, FLOOR) if tolerance is None else tolerance
    found = (
        f"the log-probs of {probe.tokens} probe tokens differ between the {engine} engine (weight version {version}) "
        f"and the trainer by {probe.mean_abs_diff:.3g} nats on average (median {probe.median_abs_diff:.3g}, 90 % below "
        f"{probe.p90_abs_diff:.3g}, largest {probe.max_abs_diff:.3g}); a rounding in every layer changes the trainer's "
        f"own by {probe.rounding:.3g}"
    )
    if not probe.mean_abs_diff <= limit:  # a NaN must fail too
        other = (
            "the model's own generation with a key-value cache differs from its pass over whole sequences, and so it "
            "cannot be trained on-policy"
            if engine == "transformers"
            else "the back-end implements this model, its positions or the temperature differently: set "
            "rollout.backend: transformers"
        )
        raise RolloutError(
            f"the {engine} engine does not compute what the trainer computes: {found}. The average may be {limit:.3g}. "
            f"Its weights may be stale, or {other}. If you know that this is rounding, set sync_tolerance"
        )
    if probe.mean_abs_diff > max(WARN * probe.rounding, FLOOR):
        logger.warning("%s: more than rounding usually does. rollout_correction weighs such differences", found)


@contextmanager
def rounded_layers(core: Model, dtype: torch.dtype) -> Iterator[None]:
    """Round the output of every layer at random, as coarsely as the coarsest arithmetic in use does.

    That is the engine's `dtype`, that of autocast, or that of the layer's output. What it changes is what two correct
    implementations of the model may differ by, to within a small factor.
    """
    generator = torch.Generator(device=core.device).manual_seed(0)

    def rounded(values: Tensor) -> Tensor:
        kinds = [dtype, values.dtype]
        if torch.is_autocast_enabled(values.device.type):
            kinds.append(torch.get_autocast_dtype(values.device.type))
        unit = max(torch.finfo(kind).eps for kind in kinds) / 2
        noise = torch.rand(values.shape, generator=generator, device=values.device).mul_(2 * unit).sub_(unit)
        wide = torch.promote_types(values.dtype, torch.float32)
        return (values.to(wide) * (1 + noise)).to(values.dtype)

    def hook(module, args, output):
        return rounded(output) if isinstance(output, Tensor) else (rounded(output[0]), *output[1:])

    handles = [layer.register_forward_hook(hook) for layer in _layers_of_text(core)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _layers_of_text(core: Model) -> nn.ModuleList | tuple[()]:
    """A tower of images comes first in a model that has one, and no text goes through its layers."""
    unseen = tuple(f"{name}." for name in unreached(core))
    found = [
        module
        for name, module in core.named_modules()
        if isinstance(module, nn.ModuleList) and not f"{name}.".startswith(unseen)
    ]
    count = getattr(core.config.get_text_config(), "num_hidden_layers", None)
    return next((module for module in found if len(module) == count), found[0] if found else ())
