"""Log-probs of the completion tokens of preference pairs, whatever the layout of the batch."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

from align.modeling.logprobs import head_inputs, language_model, model_inputs, values_at
from align.modeling.token_values import token_values
from align.modeling.types import Model


@dataclass
class PairTokens:
    """Values per completion token, left-aligned, 0 outside the mask. Rows: B chosen, then B rejected in their order.

    logps: [2B, L], log pi(y_t | x, y_<t), natural log, EOS included; float32 (float64 for a float64 model).
    mask: [2B, L], bool.
    None where not asked for:
    kl: [2B, L], KL(ref(.|x, y_<t) || pi(.|x, y_<t)) over the whole vocabulary, in nats.
    log_sum_sq_probs: [2B, L], log sum_v pi(v|x, y_<t)^2, without gradient.
    """

    logps: Tensor
    mask: Tensor
    kl: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None


class RunningReference(Protocol):
    """What is needed of a `Reference`."""

    def active(self) -> AbstractContextManager[Model]:
        """The model that is the reference, for what runs inside."""


class Completions(NamedTuple):
    """Where a batch holds its completion tokens; [2B, L] each, left-aligned, B chosen rows and then B rejected.

    ids: the tokens. mask: bool. sources: the position that predicts the token (the one before it), counted through the
    flattened [rows * T] positions of the batch; 0 outside the mask.
    """

    ids: Tensor
    mask: Tensor
    sources: Tensor


def pair_tokens(
    model: Model, batch: dict[str, Tensor], *, chunk_size: int | None = None, sum_squares: bool = False
) -> PairTokens:
    """Log-probs of the completions of a batch of pairs, differentiable.

    Args:
        model: a causal language model, bare or wrapped (PEFT, DDP, FSDP2).
        batch: of `PairCollator`, or of `SharedPrefixCollator` for a model that takes such rows
            (`prefix_support.enable_shared_prefix`).
        chunk_size: the most tokens whose logits exist at once; None: as many as are fast.
        sum_squares: also give `log_sum_sq_probs`.
    """
    return _tokens(model, batch, chunk_size=chunk_size, sum_squares=sum_squares)[0]


def pair_tokens_with_kl(
    model: Model,
    reference: RunningReference,
    batch: dict[str, Tensor],
    *,
    chunk_size: int | None = None,
    sum_squares: bool = False,
) -> tuple[PairTokens, PairTokens]:
    """Tokens of the policy with their KL to the reference, and those of the reference (without gradient).

    The reference runs first, in `reference.active()`, and leaves its hidden states at the completion tokens; its
    distributions are made from these beside the policy's, tile by tile, in the forward and in the backward pass.
    """
    positions = completions(batch)
    with reference.active() as ref_model:
        head, hidden = head_inputs(ref_model, pair_inputs(ref_model, batch), positions.sources[positions.mask])
    policy, ref = _tokens(model, batch, chunk_size=chunk_size, sum_squares=sum_squares, reference=(head, hidden))
    return policy, cast(PairTokens, ref)


def _tokens(model: Model, batch: dict[str, Tensor], **options) -> tuple[PairTokens, PairTokens | None]:
    positions = completions(batch)
    finish = partial(token_values, targets=positions.ids[positions.mask], **options)
    values = values_at(model, pair_inputs(model, batch), positions.sources[positions.mask], finish)
    kl, log_squares, ref_logps = (
        None if v is None else _rows(v, positions) for v in (values.kl, values.log_sum_squares, values.ref_logps)
    )
    policy = PairTokens(_rows(values.logps, positions), positions.mask, kl, log_squares)
    return policy, None if ref_logps is None else PairTokens(ref_logps, positions.mask)


def pair_inputs(model: Model, batch: dict[str, Tensor]) -> dict:
    """Keyword arguments of a forward pass of the model."""
    if "position_ids" in batch:
        return {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")} | {"use_cache": False}
    return model_inputs(language_model(model), batch["input_ids"], batch["attention_mask"])


def completions(batch: dict[str, Tensor]) -> Completions:
    """The completion tokens of a batch of pairs."""
    if "completion_sources" in batch:
        return Completions(batch["completion_ids"], batch["completion_mask"], batch["completion_sources"])
    input_ids, wanted = batch["input_ids"], batch["completion_mask"].bool()
    lengths = wanted.sum(-1)
    columns = torch.argsort(wanted.logical_not().to(torch.uint8), dim=-1, stable=True)[:, : int(lengths.max())]
    mask = torch.arange(columns.shape[1], device=columns.device) < lengths[:, None]
    starts = torch.arange(len(columns), device=columns.device)[:, None] * input_ids.shape[1]
    return Completions(input_ids.gather(-1, columns), mask, torch.where(mask, starts + columns - 1, 0))


def _rows(values: Tensor, positions: Completions) -> Tensor:
    return values.new_zeros(positions.mask.shape).masked_scatter(positions.mask, values)


def at_completions(values: Tensor, positions: Completions) -> Tensor:
    """Values of every position [rows, T, ...] to the completion tokens they predict: [2B, L, ...], 0 outside the mask.

    This is how anything that a model computes per position (a hidden state, an activation, a mask) is lined up with
    `PairTokens`: the entry for token y_t is taken at the position before it, which has seen x and y_<t.
    """
    taken = values.flatten(0, 1)[positions.sources]
    return taken.masked_fill(~positions.mask.view(*positions.mask.shape, *[1] * (taken.dim() - 2)), 0)
