"""The text model inside a model of several kinds of input (Gemma 3 with its vision tower), of which only text is
trained here: what no text reaches is frozen and gets no adapter, and an engine runs the text model alone."""

import copy
import logging
import re
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from align.errors import ConfigError
from align.modeling.linear_layers import unfit_for_adapters
from align.modeling.types import Model

logger = logging.getLogger(__name__)

_text_models: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
_LIKE = {
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
}
"""Text models without a class of their own that compute, on text, what a model of text does: their positions in time,
height and width are then one and the same."""

CHOOSING = ("e_score_correction_bias", "expert_bias")
"""Biases by which a mixture chooses its experts. ERNIE 4.5 and AFMoE have them as parameters without gradient, which
transformers' loading makes trainable."""


def unreached(core: Model) -> dict[str, nn.Module]:
    """The modules of a transformers model that no text reaches (vision and audio towers, projectors), by name; none for
    a model of text alone."""
    return dict(_beside_decoder(core)) if core.config.get_text_config() is not core.config else {}


def without_gradient(core: Model) -> dict[str, nn.Module]:
    """Modules that read text and get no gradient, by name: indexers (DeepSeek V3.2, GLM-5), which choose keys."""
    return {name: module for name, module in core.named_modules() if type(module).__name__.endswith("Indexer")}


def _beside_decoder(core: Model) -> Iterator[tuple[str, nn.Module]]:
    """Every module that lies beside the decoder, or beside one that it lies in, up to the model without its head."""
    base, decoder, head = core.base_model, core.get_decoder(), core.get_output_embeddings()
    names = {id(module): name for name, module in core.named_modules()}
    if id(decoder) not in names:
        return
    top = "" if "base_model_prefix" in vars(core) else names[id(base)]  # named by us: its towers lie beside the base
    name = names[id(decoder)]
    while name and name != top:
        above = name.rpartition(".")[0]
        for child, module in core.get_submodule(above).named_children():
            full = f"{above}.{child}".lstrip(".")
            if full != name and module is not head:
                yield full, module
        name = above


def name_base(core: Model) -> None:
    """In place: transformers calls the model under the head of Llama 4 and of Qwen-Omni by a name that it has not, and
    then takes the whole model for it, which TRL's SFT loss asks for hidden states."""
    from transformers import PreTrainedModel

    if core.base_model is core and isinstance(vars(core)["_modules"].get("model"), PreTrainedModel):
        core.base_model_prefix = "model"


def never_trained(core: Model) -> Iterator[nn.Parameter]:
    for module in (*unreached(core).values(), *without_gradient(core).values()):
        yield from module.parameters()
    yield from (parameter for name, parameter in core.named_parameters() if name.endswith(CHOOSING))


def freeze_unreached(core: Model) -> None:
    """In place: weights without gradient stop DDP. FSDP2 is left to find the layers that are there: transformers' list
    of what to shard has those of other vision towers too (of Gemma 4's text model as well), which accelerate refuses.
    """
    name_base(core)
    for parameter in never_trained(core):
        parameter.requires_grad_(False)
    parts = unreached(core)
    there = {type(module).__name__ for module in core.modules()}
    core._no_split_modules = sorted(there & set(core._no_split_modules or ()))
    if parts:
        count = sum(p.numel() for module in parts.values() for p in module.parameters())
        logger.info(
            "%s: %s see no text: their %.0fM parameters are not trained, and are saved as they are",
            *(type(core).__name__, ", ".join(parts), count / 1e6),
        )


def adapter_of_text(core: Model, peft_config):
    """The PEFT config with what no text reaches among its `exclude_modules`, as `all-linear` and `q_proj` name a
    vision tower's layers too; and the layers of text that an adapter would not fit."""
    every = getattr(peft_config, "target_modules", None) == "all-linear"
    unfit = unfit_for_adapters(core, every)
    if unfit:
        logger.info("%s get no adapter: they are no linear layers, or not called as such", ", ".join(unfit))
    parts = [re.escape(name) for name in (*unreached(core), *without_gradient(core), *unfit)]
    if not parts or not hasattr(peft_config, "exclude_modules"):
        return peft_config
    peft_config, own = copy.deepcopy(peft_config), peft_config.exclude_modules
    patterns = [rf"({'|'.join(parts)})(\..*)?"]
    if isinstance(own, str):
        patterns.append(f"({own})")
    elif own:
        patterns.append(rf"(.*\.)?({'|'.join(re.escape(name) for name in own)})")
    peft_config.exclude_modules = "|".join(patterns)
    return peft_config


def text_model(core: Model) -> Model:
    """The causal language model of text alone (`Gemma3ForCausalLM`) that shares its modules with `core`, adapters
    included; `core` itself if that is one. Raises `ConfigError` where transformers has no class for it."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if not unreached(core):
        return core
    text = _text_models.get(core)
    if text is None:
        config = _config_of_text(core.config.get_text_config())
        config.tie_word_embeddings = core.config.tie_word_embeddings
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ConfigError(
                f"transformers has no class for the text model of {type(core).__name__}: set rollout.backend: "
                "transformers"
            )
        with torch.device("meta"):
            text = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
        text.generation_config = core.generation_config
        _text_models[core] = text
    setattr(text, text.base_model_prefix, core.get_decoder())
    text.set_output_embeddings(core.get_output_embeddings())  # an adapter may have replaced it
    return text


def _config_of_text(config: Any) -> Any:
    """A copy; of the model of text that computes the same, where there is one."""
    from transformers import AutoConfig

    if config.model_type not in _LIKE:
        return copy.deepcopy(config)
    settings = {name: value for name, value in config.to_dict().items() if name != "model_type"}
    settings["rope_parameters"] = {k: v for k, v in config.rope_parameters.items() if not k.startswith("mrope_")}
    return AutoConfig.for_model(_LIKE[config.model_type], **settings, norm_topk_prob=True)
