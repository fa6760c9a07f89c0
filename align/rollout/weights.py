"""The weights of a policy under the names of its plain transformers model: adapters merged, shards gathered."""

import copy
from collections.abc import Iterator

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from align.distributed.shards import gathered, whole
from align.errors import ConfigError
from align.modeling.logprobs import language_model
from align.modeling.types import Model


def named_weights(model: Model) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every parameter and persistent buffer of the transformers model inside `model`, tied ones once.

    The tensors stay valid after the iterator has moved on (vLLM collects the parts of a fused layer before it copies
    them), and may be the model's own: do not write to them. Adapters are merged into a copy, one layer at a time:
    merging them in place and back would lose bits of the frozen weights at every push in half precision (1.3 % rms
    after 1,000). Sharded parameters (FSDP2, ZeRO-3) are gathered one by one, so every rank must run the iterator to its
    end.
    """
    check_supported(model)
    core = language_model(model)
    return _walk(core, "", {id(p) for p in core.parameters()})


def checkpoint_weights(model: Model) -> Iterator[tuple[str, Tensor]]:
    """`named_weights` with the names and layout of the model's checkpoint files, which is what vLLM reads.

    transformers holds a few architectures otherwise in memory (mixtures of experts: all experts of a layer in one
    tensor). Their weights are converted all together, so they are all collected first; others stay a stream.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import revert_weight_conversion

    core = language_model(model)
    conversions = vars(core).get("_weight_conversions")  # set by from_pretrained
    if conversions is None:
        conversions = get_model_conversion_mapping(core, add_legacy=False)
    if not conversions:
        return named_weights(model)
    return iter(revert_weight_conversion(core, dict(named_weights(model))).items())


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
    if core.config.get_text_config().tie_word_embeddings and any(_is_adapted(module) for module in embeddings):
        raise ConfigError(
            "the model ties its input and output embeddings, and an adapter on one of them would untie them in the "
            "rollout engine: leave embed_tokens and lm_head out of lora_target_modules and lora_modules_to_save"
        )


def _is_adapted(module: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))


def _walk(module: nn.Module, prefix: str, pending: set[int] | None) -> Iterator[tuple[str, Tensor]]:
    """`pending`: ids of the parameters not given yet; None inside a merged copy, whose ids mean nothing."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    if isinstance(module, BaseTunerLayer):
        module, pending = _merged_copy(module), None
    elif isinstance(module, ModulesToSaveWrapper):
        module = module.modules_to_save[module.active_adapters[0]] if module.active_adapters else module.original_module
    elif isinstance(module, AuxiliaryTrainingWrapper):
        raise ConfigError(f"rollouts do not support {type(module).__name__} adapters ({prefix.rstrip('.')}): use LoRA")
    for name, parameter in module.named_parameters(recurse=False):
        if pending is not None:
            if id(parameter) not in pending:
                continue
            pending.discard(id(parameter))
        yield prefix + name, whole(parameter)
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            yield prefix + name, buffer.detach()
    for name, child in module.named_children():
        yield from _walk(child, f"{prefix}{name}.", pending)


def _merged_copy(layer: nn.Module) -> nn.Module:
    """The base layer of an adapter layer with its active adapters merged in, apart from the original."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    with gathered(layer.parameters()):
        merged = copy.deepcopy(layer)
    for module in merged.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):
                setattr(module, name, nn.Parameter(whole(parameter), requires_grad=False))
    level = merged
    while isinstance(level, BaseTunerLayer):  # adapters on adapters: the innermost is the plain layer
        level.merge()
        level = level.base_layer
    return level
