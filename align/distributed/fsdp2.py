"""What accelerate does not do for models under FSDP2.

Buffers: what a model saves and does not train, such as the biases by which mixtures of experts choose (DeepSeek V3, GLM
4, LFM2, Nemotron-H) and the scales of Gemma 4's layers. Layers: those of a second model of another architecture.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn


def prepare_fsdp2(accelerator: Accelerator, model: nn.Module) -> Any:
    """accelerate's function, with the model's buffers and by its layers."""
    with sent_buffers(accelerator, model), own_layers(accelerator, model):
        return fsdp2_prepare_model(accelerator, model)


def patch_prepare(accelerator: Accelerator) -> None:
    """In place: `accelerator.prepare` does the same for whatever models it is given."""
    if not accelerator.is_fsdp2:
        return
    prepare = accelerator.prepare

    def prepare_all(*objects: Any, **options: Any) -> Any:
        models = [one for one in objects if isinstance(one, nn.Module)]
        with sent_buffers(accelerator, *models), own_layers(accelerator, *models):
            return prepare(*objects, **options)

    accelerator.prepare = prepare_all


@contextmanager
def sent_buffers(accelerator: Accelerator, *models: nn.Module) -> Iterator[None]:
    """Every process gets the buffers that the main one has read. Inside they are in no state dict: accelerate takes
    each entry of it for shards under `cpu_ram_efficient_loading`, and ends in an AttributeError; other buffers it
    keeps."""
    hidden = []
    for module in (module for model in models for module in model.modules()):
        unsaved = module._non_persistent_buffers_set
        for name, buffer in module.named_buffers(recurse=False):
            if name not in unsaved:
                sent = buffer.to(accelerator.device).contiguous()
                dist.broadcast(sent, src=0)
                module.register_buffer(name, sent.to(buffer.device), persistent=False)
                hidden.append((module, name))
    try:
        yield
    finally:
        for module, name in hidden:
            module._non_persistent_buffers_set.discard(name)


@contextmanager
def own_layers(accelerator: Accelerator, *models: nn.Module) -> Iterator[None]:
    """A model is split by its own layers. accelerate keeps the classes of the first one that it splits, or those that
    its file names, and ends in a ValueError where another (a reference, a critic) has none of them."""
    plugin = accelerator.state.fsdp_plugin
    asked = plugin.transformer_cls_names_to_wrap
    classes = {type(module).__name__ for model in models for module in model.modules()}
    if asked is not None and classes.isdisjoint(asked):
        plugin.transformer_cls_names_to_wrap = None
    try:
        yield
    finally:
        plugin.transformer_cls_names_to_wrap = asked
