"""`batching`: whether the sequences that begin with one prompt share its computation. One option of all trainers."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from align.errors import ConfigError
from align.modeling.prefix_support import LOGPS, check_wrapped
from align.trainers.core.hooks import TrainingSettings

logger = logging.getLogger(__name__)

BATCHINGS = ("auto", "shared_prefix", "padded")


@dataclass
class BatchingOptions(TrainingSettings):
    """Mixed into the config of a method, in front of `BaseConfig`."""

    batching: str = field(
        default="auto",
        metadata={
            "help": "shared_prefix: the completions of a prompt share its computation, and nothing is padded. padded: "
            "one row per completion. auto: the first where the model allows it.",
            "choices": list(BATCHINGS),
        },
    )


def resolve_layout(batching: str, obstacles: Iterable[str | None]) -> bool:
    """Whether batches have shared prefixes (`align.modeling.shared_prefix`) or are padded.

    obstacles: of each model that runs on these batches, why it cannot take shared prefixes, or None. They are looked at
        in order up to the first one, and not at all with `padded`: pass a generator where looking costs something.

    Raises ConfigError where shared prefixes are asked for and a model cannot take them; with `auto` that is a warning.
    """
    if batching == "padded":
        return False
    reason = next((reason for reason in obstacles if reason is not None), None)
    if reason is None:
        return True
    if batching == "shared_prefix":
        raise ConfigError(f"batching: shared_prefix cannot be used with this model: {reason}")
    logger.warning(
        "batches are padded, and prompts are computed once per completion: %s (`batching: padded` says that this is "
        "meant)",
        reason,
    )
    return False


def autocast_dtype(args: TrainingArguments) -> torch.dtype | None:
    """The dtype of the run's mixed precision; None without."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


class CheckSharedRows(TrainerCallback):
    """As training begins on several processes: shared rows are checked again on the model as it is wrapped for them."""

    def __init__(self, trainer: Trainer, probe=LOGPS):
        self.trainer, self.probe = trainer, probe

    def on_train_begin(self, args, state, control, **kwargs):
        if self.trainer.accelerator.num_processes > 1:
            check_wrapped(self.trainer.model_wrapped, autocast_dtype(args), self.probe)
