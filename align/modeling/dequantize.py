"""Checkpoints with weights in fewer bits that transformers reads as ordinary numbers: MXFP4 (GPT-OSS) and FP8 (DeepSeek
V3, Qwen3-FP8). Weights of few bits cannot be trained; they are read as ordinary numbers, and saved and sent to engines
as such."""

import copy
from contextlib import contextmanager
from typing import Any

from align.errors import ConfigError

READ_AS_ORDINARY = ("mxfp4", "fp8")
"""transformers has the option for more; what it makes of compressed-tensors keeps its scales and has no gradient."""
NOT_TRAINED = (
    "the weights are quantised%s, which cannot be trained: train an adapter on them (use_peft, peft_config), or start "
    "from the model as it was before that"
)


def stored_form(config: Any) -> dict[str, Any] | None:
    """What a model's config says of quantised weights; None where it says nothing."""
    found = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(decoder=True), "quantization_config", None
    )
    return found if found is None or isinstance(found, dict) else found.to_dict()


def dequantizing(config: Any) -> Any:
    """The `quantization_config` with which `from_pretrained` reads the weights as ordinary numbers; None for weights
    that are stored so, or in another form than `READ_AS_ORDINARY`."""
    from transformers.quantizers.auto import AutoQuantizationConfig

    stored = stored_form(config) or {}
    if stored.get("quant_method") not in READ_AS_ORDINARY:
        return None
    found = AutoQuantizationConfig.from_dict(stored)
    found.dequantize = True
    return found


def of_ordinary_weights(config: Any) -> Any:
    """A copy of a model's config that says nothing of quantised weights."""
    config = copy.deepcopy(config)
    for part in (config, config.get_text_config()):
        vars(part).pop("quantization_config", None)
    return config


def check_trained_form(model: Any) -> None:
    """ConfigError for a model that is to be trained in full and whose weights are of few bits."""
    config = getattr(model, "config", None)
    if stored := config and stored_form(config):
        raise ConfigError(NOT_TRAINED % f" ({stored.get('quant_method')})")


@contextmanager
def told_of_quantised_weights():
    """transformers' ValueError, of the forms of which it knows that they are not trained, as `check_trained_form`'s."""
    try:
        yield
    except ValueError as error:
        if "fine-tuning on purely quantized models" in str(error):
            raise ConfigError(NOT_TRAINED % "") from error
        raise


def keep_ordinary(model: Any) -> None:
    """Of a model whose weights were read as ordinary numbers: they are saved in that form, under the names that they
    have there. transformers would revert what it did at loading: it saves FP8 without saying so in the config, which
    nothing reads back, and no experts of GPT-OSS (before 5.24)."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    used = vars(model).get("_weight_conversions") or []
    if not any(_dequantizes(conversion) for conversion in used):
        return
    ordinary = {
        _targets(conversion): conversion for conversion in get_model_conversion_mapping(model, add_legacy=False)
    }
    kept = [ordinary.get(_targets(conversion)) if _dequantizes(conversion) else conversion for conversion in used]
    model._weight_conversions = [c for c in kept if c is not None and not _of_scales(c)]


def _dequantizes(conversion: Any) -> bool:
    return any("Dequantize" in type(step).__name__ for step in getattr(conversion, "operations", ()))


def _of_scales(conversion: Any) -> bool:
    return all("scale" in pattern for pattern in conversion._original_target_patterns)


def _targets(conversion: Any) -> tuple[str, ...]:
    return conversion.scope_prefix or "", *(
        pattern.removesuffix("$") for pattern in conversion._original_target_patterns
    )
