"""Dropout: off in what is compared with another model or with its own rollouts."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from align.modeling.types import Model

logger = logging.getLogger(__name__)


def disable_dropout(model: Model) -> None:
    """Set every dropout to 0. Dropout makes a policy differ from its rollouts and from its reference."""
    adapters = set()
    for name, module, key in list(_dropouts(model)):
        if isinstance(module, nn.modules.dropout._DropoutNd) and "lora_dropout" in name:
            adapters.add(module.p)
        setattr(module, key, 0.0)
    if adapters:
        logger.warning(
            "lora_dropout %s is off: disable_dropout is true, as it is by default, and means an adapter's dropout too "
            "(as in TRL); to train with it set disable_dropout: false",
            ", ".join(map(str, sorted(adapters))),
        )


def has_dropout(model: Model) -> bool:
    return next(_dropouts(model), None) is not None


def _dropouts(model: Model) -> Iterator[tuple[str, nn.Module, str]]:
    """(name, module, attribute) of every dropout above 0: modules, or numbers that a module passes on (`dropout` and
    `layerdrop` of OPT, `attention_dropout`)."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            yield name, module, "p"
        for key, value in vars(module).items():
            if isinstance(value, float) and "drop" in key and value > 0:
                yield name, module, key


@contextmanager
def without_dropout(model: Model) -> Iterator[None]:
    """The model in eval mode, for as long as the context lasts."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
