"""The weights of a policy under the names of its plain transformers model: adapters merged, shards gathered."""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from align.distributed.shards import gathered, whole
from align.errors import ConfigError
from align.modeling.logprobs import language_model
from align.modeling.text_part import text_model
from align.modeling.types import Model

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Weight:
    """One tensor of a model. `value(dtype)` computes it; shards are cast before they are gathered."""

    name: str
    shape: torch.Size
    value: Callable[[torch.dtype | None], Tensor]
    trained: bool = True


def named_weights(
    model: Model, dtype: torch.dtype | None = None, arrived=None, *, merged: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every parameter and persistent buffer of the transformers model inside `model`, tied ones once.

    dtype: what floating-point tensors are cast to; None: as they are. arrived: an `ArrivedShare` that is told how much
    of the adapters the cast leaves. merged: False leaves the adapters out.

    The tensors stay valid after the iterator has moved on (vLLM collects the parts of a fused layer), and may be the
    model's own: do not write to them. Adapters are merged into a copy, one layer at a time and in float32: merging them
    in place and back would lose bits of the frozen weights at every push in half precision (1.3 % rms after 1,000).
    Sharded parameters (FSDP2, ZeRO-3) are gathered one by one, so every rank must run the iterator to its end.
    """
    for weight in weights_of(model, arrived, merged=merged):
        yield weight.name, weight.value(dtype)


def weights_of(model: Model, arrived=None, *, merged: bool = True, text: bool = False) -> Iterator[Weight]:
    """Every tensor that `named_weights` gives, not computed yet. text: of the text model alone, under its names."""
    check_supported(model)
    core = text_model(language_model(model)) if text else language_model(model)
    return _walk(core, "", set(), (lambda layer: Merged(layer, arrived)) if merged else None)


def own_weights(core: Model) -> Iterator[Weight]:
    """Every parameter and persistent buffer of a model as it is, adapters beside their layers, tied ones once."""
    for name, parameter in core.named_parameters():
        yield Weight(name, parameter_shape(parameter), parameter_value(parameter), parameter.requires_grad)
    for prefix, module in core.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield Weight(f"{prefix}.{name}".lstrip("."), buffer.shape, parameter_value(buffer), False)


def checkpoint_weights(
    model: Model, dtype: torch.dtype | None = None, arrived=None, *, merged: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """`named_weights` with the names and layout of the model's checkpoint files, which is what vLLM reads; of the text
    model alone, if the model has other parts.

    transformers holds a few architectures otherwise in memory (mixtures of experts: all experts of a layer in one
    tensor). They are converted layer by layer, so that no more than one layer is held at a time.
    """
    weights = weights_of(model, arrived, merged=merged, text=True)
    return as_in_checkpoint(text_model(language_model(model)), ((w.name, w.value(dtype)) for w in weights))


def checkpoint_shapes(model: Model, *, merged: bool = True) -> dict[str, torch.Size]:
    """Name and shape of every tensor that `checkpoint_weights` gives, in its order; nothing is gathered."""
    weights = weights_of(model, merged=merged, text=True)
    outlines = ((weight.name, torch.empty(weight.shape, device="meta")) for weight in weights)
    return {name: tensor.shape for name, tensor in as_in_checkpoint(text_model(language_model(model)), outlines)}


def as_in_checkpoint(core: Model, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import revert_weight_conversion

    conversions = vars(core).get("_weight_conversions")  # set by from_pretrained
    if conversions is None:
        conversions = get_model_conversion_mapping(core, add_legacy=False)
    if not conversions:
        yield from weights
        return
    layer = None
    held: dict[str, Tensor] = {}
    for name, tensor in weights:
        if held and layer_of(name) != layer:
            yield from revert_weight_conversion(core, held).items()
            held = {}
        layer, held[name] = layer_of(name), tensor
    yield from revert_weight_conversion(core, held).items()


def layer_of(name: str) -> str:
    """The part of a tensor's name up to its first number: what is converted together shares it."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return "" if number is None else ".".join(parts[: number + 1])


def check_supported(model: Model) -> None:
    """Raises `ConfigError` for models whose weights cannot be handed to an engine."""
    from peft import PeftModel
    from torch.distributed.fsdp import FullyShardedDataParallel

    core = language_model(model)
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ConfigError("rollouts need FSDP2 (fsdp_version: 2 in the accelerate config): FSDP1 hides the parameters")
    if getattr(core, "hf_quantizer", None) is not None:  # set by from_pretrained on quantised models only
        raise ConfigError("rollouts do not support a quantised policy: load it without load_in_4bit or load_in_8bit")
    if not isinstance(model, PeftModel):
        return
    if any(config.is_prompt_learning for config in model.peft_config.values()):
        raise ConfigError("prompt-learning adapters cannot be merged into weights: use LoRA for on-policy training")
    embeddings = (core.get_input_embeddings(), core.get_output_embeddings())
    if core.config.tie_word_embeddings and any(_is_adapted(module) for module in embeddings):
        raise ConfigError(
            "the model ties its input and output embeddings, and an adapter on one of them would untie them in the "
            "rollout engine: leave embed_tokens and lm_head out of lora_target_modules and lora_modules_to_save"
        )


def _is_adapted(module: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))


def _walk(module: nn.Module, prefix: str, given: set[int], merge: Callable | None) -> Iterator[Weight]:
    """given: ids of the parameters that were given. merge: makes the merged twin of an adapter layer; None: no twin."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    merged = None
    if isinstance(module, BaseTunerLayer):
        merged, module = merge and merge(module), innermost(module)
    elif isinstance(module, ModulesToSaveWrapper):
        module = module.modules_to_save[module.active_adapters[0]] if module.active_adapters else module.original_module
    elif isinstance(module, AuxiliaryTrainingWrapper):
        raise ConfigError(f"rollouts do not support {type(module).__name__} adapters ({prefix.rstrip('.')}): use LoRA")
    for name, parameter in module.named_parameters(recurse=False):
        if id(parameter) not in given:
            given.add(id(parameter))
            value = parameter_value(parameter) if merged is None else merged.value(name)
            yield Weight(prefix + name, parameter_shape(parameter), value)
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            yield Weight(prefix + name, buffer.shape, parameter_value(buffer))
    for name, child in module.named_children():
        yield from _walk(child, f"{prefix}{name}.", given, merge)


def parameter_shape(parameter: Tensor) -> torch.Size:
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 leaves an empty tensor in its place


def parameter_value(parameter: Tensor) -> Callable[[torch.dtype | None], Tensor]:
    def value(dtype: torch.dtype | None) -> Tensor:
        if isinstance(parameter, DTensor):  # half as much to send, if cast first
            return whole(cast(parameter.detach(), dtype))
        return cast(whole(parameter), dtype)

    return value


def cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


class Merged:
    """The base layer of an adapter layer with its active adapters merged in, apart from the original, in float32."""

    def __init__(self, layer: nn.Module, arrived):
        self.adapted, self.arrived = layer, arrived

    @cached_property
    def layer(self) -> nn.Module:
        from peft.tuners.tuners_utils import BaseTunerLayer

        with gathered(self.adapted.parameters()):
            merged = copy.deepcopy(self.adapted)
        for module in merged.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if isinstance(parameter, DTensor):
                    setattr(module, name, nn.Parameter(whole(parameter), requires_grad=False))
        if any(p.dtype in HALF for p in merged.parameters()):
            merged = merged.float()
        while isinstance(merged, BaseTunerLayer):
            merged.merge()
            merged = merged.base_layer
        return merged

    def value(self, name: str) -> Callable[[torch.dtype | None], Tensor]:
        base = getattr(innermost(self.adapted), name)

        def value(dtype: torch.dtype | None) -> Tensor:
            merged = self.layer.get_parameter(name).detach()
            sent = cast(merged, dtype or base.dtype)
            if self.arrived is not None and sent.dtype in HALF:
                before = parameter_value(base)(None)
                change = merged - before.float()
                arrived = sent.float() - before.to(sent.dtype).float()
                self.arrived.add((arrived * change).sum().item(), change.square().sum().item())
            return sent

        return value


def innermost(layer: nn.Module) -> nn.Module:
    """The plain layer under an adapter layer, or under adapters on adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    while isinstance(layer, BaseTunerLayer):
        layer = layer.base_layer
    return layer
