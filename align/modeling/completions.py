"""Log-probs of the tokens of sampled completions, whatever the layout of the batch."""

from functools import partial
from typing import Literal, overload

from torch import Tensor

from align.modeling.logprobs import values_at
from align.modeling.pairs import Completions, pair_inputs
from align.modeling.token_values import token_values
from align.modeling.types import Model


@overload
def completion_logps(
    model: Model, batch: dict[str, Tensor], *, temperature: float = 1.0, return_entropy: Literal[False] = False
) -> Tensor: ...


@overload
def completion_logps(
    model: Model,
    batch: dict[str, Tensor],
    *,
    temperature: float = 1.0,
    return_entropy: Literal[True],
    entropy_gradient: bool = False,
) -> tuple[Tensor, Tensor]: ...


def completion_logps(
    model: Model,
    batch: dict[str, Tensor],
    *,
    temperature: float = 1.0,
    return_entropy: bool = False,
    entropy_gradient: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """log p of each completion token at `temperature`, natural log: [B, L] float32 (or float64), 0 outside the mask.

    Differentiable, unless called under `torch.no_grad()`.

    Args:
        model: a causal language model, bare or wrapped (PEFT, DDP, FSDP2).
        batch: what the model gets (input_ids, attention_mask; position_ids for rows with shared prefixes), and
            completion_ids, completion_mask and completion_sources [B, L] as in `modeling.pairs.Completions`.
        return_entropy: also return the entropy of each token's distribution in nats, [B, L]; detached unless
            entropy_gradient.
    """
    positions = Completions(batch["completion_ids"], batch["completion_mask"].bool(), batch["completion_sources"])
    finish = partial(
        token_values,
        targets=positions.ids[positions.mask],
        entropy=return_entropy,
        entropy_gradient=entropy_gradient,
    )
    values = values_at(
        model, pair_inputs(model, batch), positions.sources[positions.mask], finish, temperature=temperature
    )
    spread = (
        v.new_zeros(positions.mask.shape).masked_scatter(positions.mask, v)
        for v in (values.logps, values.entropy)
        if v is not None
    )
    logps = next(spread)
    return (logps, next(spread)) if return_entropy else logps
