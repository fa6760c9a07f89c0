"""TRL's options that have no function here: a configuration may write them out with the value that asks for nothing (as
a rule TRL's default), nothing else.

A value that asks for something is refused with what to do instead; it is never ignored.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from align.errors import ConfigError
from align.trainers.core.hooks import TrainingSettings

INSTEAD = "instead"


def of_trl(default: Any, instead: str) -> Any:
    """A field that only takes its default; instead: what to do, for the error."""
    return field(
        default=default, metadata={"help": f"TRL's, only with its default. Instead: {instead}.", INSTEAD: instead}
    )


@dataclass
class TrlDefaults(TrainingSettings):
    """Checks the fields made by `of_trl`."""

    def __post_init__(self):
        super().__post_init__()
        for option in fields(self):
            value = getattr(self, option.name)
            if INSTEAD in option.metadata and value not in (option.default, None):
                raise ConfigError(
                    f"{option.name}: {value!r} has no effect here. Instead: {option.metadata[INSTEAD]}", key=option.name
                )


@dataclass
class TrlOptions(TrlDefaults):
    """Of TRL's DPO and reward trainers."""

    trust_remote_code: bool = of_trl(False, "pass a loaded model and its tokenizer")
    pad_token: str | None = of_trl(None, "set tokenizer.pad_token, and pass the tokenizer")
    pad_to_multiple_of: int | str | None = of_trl("auto", "leave it out; batching: shared_prefix pads nothing")
    activation_offloading: bool = of_trl(False, "gradient_checkpointing")


@dataclass
class TrlRewardOptions(TrlOptions):
    """Of TRL's reward trainer."""

    eos_token: str | None = of_trl(None, "set tokenizer.eos_token, and pass the tokenizer")
    chat_template_path: str | None = of_trl(None, "set tokenizer.chat_template, and pass the tokenizer")


@dataclass
class TrlDPOOptions(TrlOptions):
    """Of TRL's DPO trainer."""

    truncation_mode: str = of_trl("keep_start", "shorten the prompts: they are never cut, completions lose their end")
    padding_free: bool = of_trl(False, "batching: shared_prefix")
    sync_ref_model: bool = of_trl(False, "train in rounds, each with the model of the last one as ref_model")
    ref_model_mixup_alpha: float = of_trl(0.6, "leave it out, the reference stays what it was")
    ref_model_sync_steps: int = of_trl(512, "leave it out, the reference stays what it was")


def loading_options(args: Any, model: Any) -> dict[str, Any]:
    """`model_init_kwargs` for a model that is named; ConfigError with one that is loaded already."""
    options = dict(args.model_init_kwargs or {})
    if options and not isinstance(model, str | Path):
        raise ConfigError(
            "model_init_kwargs are for loading a model by its name, and this one is loaded: load it with them, or set "
            "the command's own options (dtype, attn_implementation, model_revision)",
            key="model_init_kwargs",
        )
    return options
