"""What mix-ins are put in front of: transformers' `Trainer` and `TrainingArguments`.

Here they only answer arguments that they do not take, before anything else is looked at. hooks.pyi beside this file
tells the type checker what the classes have that come behind them.
"""

from importlib.metadata import version

from align.config.names import check_arguments
from align.errors import ConfigError

OVERRIDDEN = (
    "_clip_grad_norm",
    "_get_train_sampler",
    "_issue_warnings_after_load",
    "_load_best_model",
    "_load_from_checkpoint",
    "_save",
    "_save_checkpoint",
    "_set_signature_columns_if_needed",
    "_track_num_input_tokens",
)
"""Private methods of transformers' `Trainer` that ours take the place of. One that had another name in a version of
transformers would never be called, and nothing would say so."""


def check_overridden(base: type) -> None:
    """Raises `ConfigError` where a method of `OVERRIDDEN` is none of transformers' `Trainer` (base)."""
    if gone := [name for name in OVERRIDDEN if not hasattr(base, name)]:
        raise ConfigError(
            f"transformers {version('transformers')} has no Trainer.{gone[0]}, in whose place align does a part of its "
            "training: install a version that it was tested with (`align doctor` names it)"
        )


class TrainingSettings:
    """Base of a mix-in for a `TrainingArguments`."""

    def __new__(cls, *_args, **given):
        check_arguments(cls, given)
        return super().__new__(cls)


class TrainerHooks:
    """Base of a mix-in for a `Trainer`."""

    config_class = None

    def __new__(cls, *_args, **given):
        check_arguments(cls, given, cls.config_class)
        return super().__new__(cls)
