"""Steps of a model that is trained beside the policy, with an optimiser of its own: a critic, a discriminator."""

import math
from collections.abc import Iterable
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Trainer


def groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trained parameters as those of the policy are grouped: biases and norms do not decay."""
    decaying = set(Trainer.get_decay_parameter_names(cast(Any, None), model))  # of transformers; it asks no trainer
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in trained if (name in decaying) == decays], "weight_decay": weight_decay * decays}
        for decays in (True, False)
    ]


def backward(loss: Tensor, accelerator: Accelerator) -> None:
    """Add the gradients of a loss. In float16 they are scaled as the policy's are: small ones would be 0."""
    (loss * _scale(accelerator)).backward()


def step(
    parameters: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer, accelerator: Accelerator, max_norm: float
) -> Tensor | None:
    """One step on what `backward` has added, whose gradients are then forgotten. The norm of these before they are
    clipped; None where it is not finite in float16, as a scale that is too large makes it: then there is no step, and
    the scaler lowers its scale by the policy's gradients. max_norm: 0 is no limit, as transformers has it."""
    held, scale = list(parameters), _scale(accelerator)
    for gradient in [p.grad for p in held if p.grad is not None] if scale != 1 else ():
        gradient.div_(scale)
    norm = nn.utils.clip_grad_norm_(held, max_norm or math.inf)  # torch would make all gradients 0
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    skipped = accelerator.scaler is not None and not norm.isfinite()
    if not skipped:
        optimizer.step()
    optimizer.zero_grad()
    return None if skipped else norm


def _scale(accelerator: Accelerator) -> float:
    return 1.0 if accelerator.scaler is None else accelerator.scaler.get_scale()
