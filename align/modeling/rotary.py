"""LongRoPE (Ding et al. 2024, arXiv 2402.13753; Phi-3, Phi-4-mini): with which of a model's two tables of rotary
frequencies a run computes.

Such a model has one table, of `short_factor`, for sequences up to its original positions, and one of `long_factor` for
longer ones. transformers takes the table that the longest position of a batch needs, so that the log-probs of a row
depend on its neighbours and on padding; vLLM takes the one that its max_model_len needs, for every sequence. Here a
run's longest sequence decides for all of its rows, in trainer and engine alike.
"""

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a configuration is read without torch
    from torch import nn

    from align.modeling.types import Model

logger = logging.getLogger(__name__)

SHORT, LONG = "short", "long"
RECORD = "align_rope_factors"
"""Key of a saved config, and of the notes beside an adapter: with which factors the model was trained last."""
_FIXED = {"longrope, short factors": SHORT, "longrope, long factors": LONG}
"""What stands in `rope_type` of a module once its table is chosen: no kind of transformers', which so leaves it."""


def original_positions(config: Any) -> int | None:
    """Up to which a model of this configuration has short factors; None for one without LongRoPE."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return rope["original_max_position_embeddings"] if rope.get("rope_type") == "longrope" else None


def factors_for(config: Any, longest: int) -> str | None:
    """SHORT or LONG, as vLLM takes them for this max_model_len; None for a model without LongRoPE."""
    original = original_positions(config)
    return None if original is None else LONG if longest > original else SHORT


def factors_of(model: "nn.Module") -> str | None:
    """What was chosen for a model; None where nothing was, or there is no choice."""
    return next((_FIXED.get(module.rope_type) for module in _rotary(model)), None)


def choose_factors(model: "Model", longest: int) -> None:
    """Compute every sequence with the table that sequences of `longest` tokens need, and say so in the model's
    configuration. Nothing for a model without LongRoPE, or with an implementation of its own."""
    kind = factors_for(model.config, longest)
    if kind is None or factors_of(model) == kind or not _rotary(model):
        return
    original = original_positions(model.config)
    if kind == LONG:
        logger.warning(
            "LongRoPE: sequences of up to %d tokens, more than the %d original positions: all rows are computed with "
            "the factors for long sequences",
            *(longest, original),
        )
    elif recorded(model) == LONG:
        logger.warning(
            "LongRoPE: the model was trained with the factors for long sequences, and with up to %d tokens all rows "
            "are computed with those for short ones (up to %d)",
            *(longest, original),
        )
    _fix(model, kind)
    record(model, kind)


def choose_recorded(model: "Model", like: "nn.Module | None" = None) -> None:
    """For a model that is judged with, whatever the run's lengths: as it was trained, else the short factors. like: a
    model whose choice it shares."""
    if original_positions(model.config) is not None and factors_of(model) is None:
        _fix(model, (like is not None and factors_of(like)) or recorded(model) or SHORT)


def recorded(model: "Model") -> str | None:
    return getattr(model.config.get_text_config(), RECORD, None)


def record(model: "Model", kind: str | None) -> None:
    """Keep it in the configuration that is saved; SHORT, what everybody takes, by leaving it out."""
    config = model.config.get_text_config()
    if kind == LONG:
        setattr(config, RECORD, LONG)
    elif recorded(model) is not None:
        delattr(config, RECORD)


def share_factors(model: "Model", like: "nn.Module") -> None:
    """Of a model that was made from another one's configuration."""
    kind = factors_of(like)
    if kind is not None:
        _fix(model, kind)


def _rotary(model: "nn.Module") -> list[Any]:
    """The modules that transformers' `dynamic_rope_update` serves, with LongRoPE. Others (Phi-3.5-MoE's, remote code)
    choose in their own ways."""
    return [
        module
        for module in model.modules()
        if isinstance(vars(module).get("rope_type"), str)
        and module.rope_type in ("longrope", *_FIXED)
        and hasattr(type(module).forward, "__wrapped__")
        and hasattr(module, "original_inv_freq")
    ]


def _fix(model: "nn.Module", kind: str) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for module in _rotary(model):
        original = module.config.rope_parameters["original_max_position_embeddings"]
        device = module.original_inv_freq.device
        table, _ = ROPE_INIT_FUNCTIONS["longrope"](module.config, device, seq_len=original + (kind == LONG))
        module.register_buffer("inv_freq", table, persistent=False)
        module.rope_type = next(name for name, of in _FIXED.items() if of == kind)
