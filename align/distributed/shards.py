"""Parameters that are split over processes: FSDP2's are DTensors, ZeRO-3's are empty and marked with a `ds_id`.

All processes must call these together, with the same parameters in the same order.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, contextmanager
from typing import cast

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from align.modeling.types import Model


def is_zero3(parameters: Iterable[Tensor]) -> bool:
    return any(hasattr(parameter, "ds_id") for parameter in parameters)


def gathered(parameters: Iterable[Tensor], *, written: bool = False) -> AbstractContextManager:
    """Inside, ZeRO-3's parameters are whole; what the main process has written to them holds if `written`."""
    parameters = list(parameters)
    if not is_zero3(parameters):
        return torch.no_grad()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if written else None)


def whole(parameter: Tensor) -> Tensor:
    """The full tensor of a sharded parameter; the parameter itself (detached) if it is not sharded."""
    if isinstance(parameter, DTensor):
        return cast(DTensor, parameter.detach()).full_tensor()
    if is_zero3([parameter]):  # freed again when the context ends
        with gathered([parameter]):
            return parameter.detach().clone()
    return parameter.detach()


def reshard(model: Model) -> None:
    """Give FSDP2's parameters back to their shards. After a forward pass without gradients the root's (embeddings,
    head) stay whole, as plain tensors: what is written to the shards then is not seen by the next pass."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def outputs_as_computed(model: Model):
    """Inside, what the model returns has the dtypes that it was computed in. FSDP2's mixed precision casts it all to
    bfloat16, which has three digits: with it TRL's log-probs, whose mean was logged as 4.67 where it was 4.65."""
    if not isinstance(model, FSDPModule):
        yield
        return
    kept: list = []
    module = cast(Model, model)
    # before and after FSDP's own hook, which must see the tensors that the gradient comes back through
    hooks = (
        module.register_forward_hook(lambda _, args, output: kept.append(output), prepend=True),
        module.register_forward_hook(lambda _, args, output: kept.pop()),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def head_as_a_layer(core: Model):
    """Inside, FSDP2 gathers the head's weight after the trunk's pass, for code that takes it without calling the head
    (TRL's losses). A head that accelerate splits by itself (trained in full beside an adapter; that of a model whose
    last norm it does not find) such code gathers by `full_tensor`, whose gradient is of this process's rows alone."""
    head = core.get_output_embeddings()
    if not isinstance(head, FSDPModule):
        yield
        return
    hook = core.base_model.register_forward_hook(lambda *_: head.unshard())
    try:
        yield
    finally:
        hook.remove()
        if not torch.is_grad_enabled():  # else the backward pass does
            head.reshard()


def zero3_twin(model: Model) -> Model:
    """A transformers model with the weights of one that ZeRO-3 has split while it loaded it: split likewise, and filled
    tensor by tensor."""
    twin = type(model)._from_config(
        model.config, dtype=model.dtype, attn_implementation=model.config._attn_implementation
    )
    for source, target in zip(model.parameters(), twin.parameters(), strict=True):
        with gathered([source, target], written=True), torch.no_grad():
            target.copy_(source)
    return twin
