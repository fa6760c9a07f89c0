"""Adapters that go to an engine as adapters: the weights under them never move, and nothing small is rounded away.

A step of 1e-6 on a LoRA matrix is below the spacing of bfloat16 numbers around the weight that it is added to: merged,
2 % of it arrive. Sent apart, in bfloat16 too, all of it does.
"""

from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from align.modeling.logprobs import language_model
from align.modeling.text_part import text_model
from align.rollout.weights import cast, checkpoint_weights, parameter_value, weights_of

A, B = ".lora_A", ".lora_B"  # what a LoRA matrix is called beside its layer's name; B holds the scaling
MAX_RANK = 512


@dataclass
class ArrivedShare:
    """How much of the adapters' change of the weights is left in an engine's dtype: the part along it, 1.0 if all."""

    along: float = 0.0
    whole: float = 0.0

    def add(self, along: float, whole: float) -> None:
        self.along, self.whole = self.along + along, self.whole + whole

    @property
    def share(self) -> float | None:
        """None before the adapters have changed anything."""
        return self.along / self.whole if self.whole else None


def why_merged(model: PeftModel) -> str | None:
    """What keeps vLLM from holding the adapter of `model` beside the weights; None: it can."""
    from peft.tuners.lora.layer import Linear
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    active = model.active_adapters
    if len(active) != 1:
        return f"{len(active)} adapters are active"
    config = model.peft_config[active[0]]
    if config.peft_type != "LORA":
        return f"it is a {config.peft_type} adapter"
    for name, module in text_model(language_model(model)).named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            return f"{name} is trained whole (modules_to_save) or in part"
        if not isinstance(module, BaseTunerLayer):
            continue
        if type(module) is not Linear or not isinstance(module.base_layer, nn.Linear):
            return f"{name} is a {type(module).__name__} adapter of a {type(module.get_base_layer()).__name__}"
        if module.merged or module.lora_variant or module.lora_bias.get(active[0]):
            return f"{name} has a merged adapter, DoRA, another variant of LoRA, or a bias"
        if module.r.get(active[0], 0) > MAX_RANK:
            return f"{name} has rank {module.r[active[0]]}, and vLLM takes {MAX_RANK} at most"
        if name == "lm_head" or name.endswith(".lm_head"):
            return f"{name} is adapted"
    return None


def lora_rank(model: PeftModel) -> int:
    """The largest rank of the active adapter."""
    return max(layer.r[active] for _, layer, active in lora_layers(model))


def lora_layers(model: PeftModel) -> Iterator[tuple[str, Any, str]]:
    """(name, layer, adapter) of every layer with the active LoRA adapter."""
    from peft.tuners.lora.layer import LoraLayer

    (active,) = model.active_adapters
    for name, module in text_model(language_model(model)).named_modules():
        if isinstance(module, LoraLayer) and active in module.lora_A:
            yield name, module, active


def adapter_weights(model: PeftModel, dtype: torch.dtype, arrived: ArrivedShare) -> Iterator[tuple[str, Tensor]]:
    """`<layer>.lora_A` [r, in] and `<layer>.lora_B` [out, r], times the scaling, in `dtype`; shards are gathered."""
    for name, layer, active in lora_layers(model):
        first = parameter_value(layer.lora_A[active].weight)(torch.float32)
        second = parameter_value(layer.lora_B[active].weight)(torch.float32) * layer.scaling[active]
        sent = cast(first, dtype), cast(second, dtype)
        if dtype == torch.float32:  # nothing is rounded: all arrives of any change
            changes = float(second.any())
            arrived.add(changes, changes)
        else:
            arrived.add(inner(sent[0].float(), sent[1].float(), first, second), inner(first, second, first, second))
        yield name + A, sent[0]
        yield name + B, sent[1]


def with_adapter(
    model: PeftModel, dtype: torch.dtype, arrived: ArrivedShare, turn: int | None, known: Container[str]
) -> Iterator[tuple[str, Tensor]]:
    """The frozen weights as in the model's checkpoint, then the adapter. turn: of the frozen weights, which never
    change, only one, in turn; it is left out if `known`, the names in the checkpoint, lacks it. None: all of them."""
    if turn is None:
        yield from checkpoint_weights(model, dtype, merged=False)
    else:
        frozen = list(weights_of(model, merged=False, text=True))
        one = frozen[turn % len(frozen)]
        if one.name in known:
            yield one.name, one.value(dtype)
    yield from adapter_weights(model, dtype, arrived)


def inner(a: Tensor, b: Tensor, other_a: Tensor, other_b: Tensor) -> float:
    """The sum of the elementwise products of b @ a and other_b @ other_a, without making either."""
    return ((b.T @ other_b) * (a @ other_a.T)).sum().item()
