"""Weights of the processes that FSDP2 will send theirs: shapes without memory.

Under `cpu_ram_efficient_loading` transformers gives every process but the main one of its node a model of zeros, which
FSDP2 then replaces by shards of what the main process has read. Written out, these zeros are the whole model in each
process: 280 GB for 70B parameters in float32, and again for a copy. A shell is a zero that is seen everywhere: it is
computed with, is copied for nothing, and cannot be written to.
"""

import copy
import functools
import os
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from align.errors import ConfigError
from align.modeling.types import Model


class ShellsForZeros(TorchFunctionMode):
    """Inside, the zeros that transformers puts in the place of parameters are shells."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.zeros_like and isinstance(args[0], nn.Parameter) and kwargs == {"device": "cpu"}:
            return shell(args[0])
        return func(*args, **(kwargs or {}))


def shells_for_weights(model: nn.Module) -> None:
    """The same for a model whose weights were read on every process, or are on the meta device (transformers 5.23)."""
    made: dict[int, nn.Parameter] = {}  # tied weights are one parameter here and there
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False, remove_duplicate=False):
            if not is_shell(weight):
                new = nn.Parameter(shell(weight), requires_grad=weight.requires_grad)
                setattr(module, name, made.setdefault(id(weight), new))
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            if buffer.is_meta:
                setattr(module, name, torch.zeros_like(buffer, device="cpu"))


def are_sent_weights() -> bool:
    """Whether FSDP sends this process the weights that the main process of its node has read."""
    from transformers.integrations import is_fsdp_enabled

    return is_fsdp_enabled() and os.environ.get("LOCAL_RANK") != "0"


def check_sharded(accelerator: Any) -> None:
    """ConfigError where FSDP is asked for and accelerate leaves it out, as it does without accelerators: the shells
    would never get their weights, and nothing would be sharded."""
    from accelerate.utils import DistributedType

    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if asked and accelerator.num_processes > 1 and accelerator.distributed_type != DistributedType.FSDP:
        raise ConfigError(
            "FSDP needs accelerators (GPUs), and accelerate trains on CPUs here, where it leaves FSDP out: start these "
            "processes with `align launch CONFIG --cpu --num-processes N`, or leave use_cpu out where there are GPUs"
        )


def shell(like: Tensor) -> Tensor:
    """A zero on the CPU in the shape of `like`."""
    return torch.zeros((), dtype=like.dtype).expand(like.shape)


def is_shell(tensor: Tensor) -> bool:
    return tensor.numel() > 1 and not any(tensor.stride())


def fill(module: nn.Module) -> None:
    """Give the shells in a module memory of their own, for what writes to its weights."""
    for parameter in module.parameters():
        if is_shell(parameter):
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)


def copied(model: Model, dtype: torch.dtype | None = None) -> Model:
    """A copy; dtype: of its floating weights (those that are packed in integers stay), None: as they are. Shells are
    shared, tied weights are one parameter here and there, no weight is copied in another dtype on the way, and buffers
    (rotary frequencies) keep theirs."""
    weights: dict[int, nn.Parameter] = {}
    for parameter in model.parameters():
        kind = dtype if dtype is not None and parameter.is_floating_point() else parameter.dtype
        if is_shell(parameter):
            weights[id(parameter)] = nn.Parameter(shell(torch.empty_like(parameter, dtype=kind, device="meta")))
        elif kind != parameter.dtype or dtype is not None and parameter.is_floating_point():
            weights[id(parameter)] = nn.Parameter(parameter.detach().to(kind, copy=True))
    twin = copy.deepcopy(model, dict(weights))
    release(twin)
    _own_forward(twin, {id(module) for module in model.modules()})
    return twin


def release(model: nn.Module) -> None:
    """Take off what accelerate has put on a model for another run: its autocast, and the mark by which it would leave
    the model as it is, in that run's precision and without DDP. Not of one that is sharded."""
    vars(model).pop("_is_accelerate_prepared", None)
    for module in model.modules():
        forward = vars(module).pop("_original_forward", None)
        if forward is not None:
            # not accelerate's `unwrap_model`, which takes off the decorators of transformers' `forward` too
            del module.forward
            if getattr(forward, "__func__", None) is not type(module).forward:
                module.forward = forward


def _own_forward(twin: nn.Module, originals: set[int]) -> None:
    """TRL puts a function in the place of `forward` that calls the model it was made for. A copy of it would compute
    with the weights of the original: its class's own takes that place."""
    for module in twin.modules():
        forward = vars(module).get("forward")
        if forward is not None and _reaches(forward, originals):
            del module.forward


def _reaches(function: Any, originals: set[int]) -> bool:
    """Whether a callable holds one of these modules: bound to it, in its closure, or as an argument."""
    left, seen = [function], set()
    while left:
        one = left.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, nn.Module):
            if id(one) in originals:
                return True
        elif isinstance(one, MethodType):
            left += [one.__self__, one.__func__]
        elif isinstance(one, functools.partial):
            left += [one.func, *one.args, *one.keywords.values()]
        elif isinstance(one, FunctionType):
            left += [cell.cell_contents for cell in one.__closure__ or () if cell != CellType()]
    return False
