"""A language-model head, and what is computed from it per token."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class LogitTransform(NamedTuple):
    """What lies between the head's product and the logits: cap * tanh(scale * x / cap) / temperature."""

    scale: float = 1.0
    cap: float | None = None
    temperature: float = 1.0

    def __call__(self, products: Tensor) -> Tensor:
        if self.scale != 1.0:
            products = products * self.scale
        if self.cap:
            products = self.cap * torch.tanh(products / self.cap)
        return products / self.temperature if self.temperature != 1.0 else products

    def apply_(self, products: Tensor) -> Tensor:
        """The same in place."""
        if self.scale != 1.0:
            products.mul_(self.scale)
        if self.cap:
            products.div_(self.cap).tanh_().mul_(self.cap)
        return products.div_(self.temperature) if self.temperature != 1.0 else products

    def slope(self, logits: Tensor, out: Tensor | None = None) -> Tensor | float:
        """d logit / d product, from the logit: a number unless there is a cap."""
        steepness = self.scale / self.temperature
        if not self.cap:
            return steepness
        return torch.mul(logits, self.temperature / self.cap, out=out).square_().neg_().add_(1).mul_(steepness)


class Head(NamedTuple):
    """A language-model head. forward: hidden [N, d] -> products [N, vocabulary]; the logits are transform(products).

    weight [vocabulary, d], bias: of a plain linear layer, from which tiles of logits are computed; None for any other
    head (with an adapter, quantised), which is called on chunks of tokens.
    """

    forward: Callable[[Tensor], Tensor]
    vocabulary: int
    transform: LogitTransform = LogitTransform()
    weight: Tensor | None = None
    bias: Tensor | None = None


class TokenValues(NamedTuple):
    """[N] each, float32 (float64 from float64 logits); what was not asked for is None.

    logps: log p(target); kl: KL(ref || p), in nats; entropy of p, in nats, without gradient unless it was asked for.
    Without gradient: log_sum_squares, log of sum_v p(v)^2; ref_logps, log ref(target).
    """

    logps: Tensor
    kl: Tensor | None = None
    entropy: Tensor | None = None
    log_sum_squares: Tensor | None = None
    ref_logps: Tensor | None = None


def head_of(module: nn.Module, vocabulary: int, transform: LogitTransform) -> Head:
    """The head of a model, with its weights where nothing but they make its output."""
    from peft.utils.other import ModulesToSaveWrapper

    if isinstance(module, ModulesToSaveWrapper) and len(module.active_adapters) == 1:  # a copy that is trained in full
        off = module.disable_adapters
        module = module.original_module if off else module.modules_to_save[module.active_adapters[0]]
    plain = (
        type(module) is nn.Linear
        and type(module.weight) in (nn.Parameter, Tensor)  # neither sharded nor quantised
        and not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))
    )
    return Head(module.forward, vocabulary, transform, *((module.weight, module.bias) if plain else ()))


def wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
