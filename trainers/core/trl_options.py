"""TRL's options that have no function here: a configuration may write them out with the value that asks for nothing (as
a rule TRL's default), nothing else.

A value that asks for something is refused with what to do instead; it is never ignored.
"""

from dataclasses import dataclass, field, fields
from typing import Any

from align.config.arguments import INSTEAD, instead_of
from align.errors import ConfigError
from align.trainers.core.hooks import TrainingSettings
from align.trainers.core.moving_reference import MovingReferenceOptions


def of_trl(default: Any, instead: str) -> Any:
    """A field that only takes its default; instead: what to do, for the error."""
    return without_effect(default, instead, "TRL's, only with its default")


def without_effect(default: Any, instead: str, why: str) -> Any:
    """As `of_trl`; why: for the help."""
    return field(default=default, metadata={"help": f"{why}{INSTEAD}{instead}."})


@dataclass
class TrlDefaults(TrainingSettings):
    """Checks the fields made by `of_trl`."""

    def __post_init__(self):
        super().__post_init__()
        for option in fields(self):
            value, instead = getattr(self, option.name), instead_of(option)
            if instead is not None and value not in (option.default, None):
                raise ConfigError(f"{option.name}: {value!r} has no effect here{INSTEAD}{instead}", key=option.name)


@dataclass
class TrlOptions(TrlDefaults):
    """Of TRL's DPO and reward trainers."""

    pad_token: str | None = of_trl(None, "set tokenizer.pad_token, and pass the tokenizer")
    pad_to_multiple_of: int | str | None = of_trl("auto", "leave it out; batching: shared_prefix pads nothing")
    activation_offloading: bool = of_trl(False, "gradient_checkpointing")


@dataclass
class TrlRewardOptions(TrlOptions):
    """Of TRL's reward trainer."""

    eos_token: str | None = field(
        default=None, metadata={"help": "A token of the vocabulary that ends texts instead of the tokenizer's own."}
    )


@dataclass
class TrlDPOOptions(MovingReferenceOptions, TrlOptions):
    """Of TRL's DPO trainer."""

    truncation_mode: str = of_trl("keep_start", "shorten the prompts: they are never cut, completions lose their end")
    padding_free: bool = of_trl(False, "batching: shared_prefix")
