"""Options of the methods that train on pairs."""

import math
from dataclasses import dataclass, field

from align.errors import ConfigError
from align.trainers.core.batching import BatchingOptions
from align.trainers.core.eval_completions import EvalCompletionsOptions
from align.trainers.core.options import BaseConfig

DTYPES = ("bfloat16", "float16", "float32")


@dataclass
class PairConfig(BatchingOptions, BaseConfig):
    """Of all of them, reward models included. Batch sizes count pairs."""

    max_length: int | None = field(
        default=1024, metadata={"help": "Prompt and completion together, in tokens; longer completions are cut."}
    )
    tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Cut an optimiser step's pairs into micro-batches of at most so many tokens (padding counted) "
            "instead of per_device_train_batch_size pairs. Does not change the loss."
        },
    )
    disable_dropout: bool = field(
        default=True, metadata={"help": "Train without dropout, which makes a policy differ from its reference."}
    )
    num_logged_pairs: int = field(default=8, metadata={"help": "Pairs shown per evaluation in the tracker; 0: none."})

    def __post_init__(self):
        super().__post_init__()
        self.check_counts("tokens_per_batch")

    def check_counts(self, *names: str) -> None:
        """ConfigError for one of these options that is set and below 1."""
        for name in names:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name} counts from 1, got {getattr(self, name)}")


@dataclass
class PreferenceConfig(EvalCompletionsOptions, PairConfig):
    """Of those that train a policy."""

    learning_rate: float = field(default=1e-6, metadata={"help": "Initial learning rate of AdamW."})
    beta: float = field(default=0.1, metadata={"help": "Strength of the KL constraint to the reference."})
    ref_model_name_or_path: str | None = field(
        default=None, metadata={"help": "The reference. Default: the policy as it starts (LoRA: the adapter off)."}
    )
    ref_dtype: str | None = field(
        default=None,
        metadata={"help": "bfloat16, float16 or float32: of a reference of its own. Default: as the policy's."},
    )
    precompute_ref_log_probs: bool = field(
        default=False,
        metadata={"help": "Compute the reference's log-probs once, before training, and keep them on disk."},
    )
    precompute_ref_batch_size: int | None = field(
        default=None, metadata={"help": "Pairs per batch of that. Default: as in training or evaluation."}
    )
    ref_log_probs_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of these log-probs, which runs may share. Default: output_dir/ref_log_probs."},
    )
    chunk_size: int | None = field(
        default=None, metadata={"help": "The most tokens whose logits exist at once. Default: as many as are fast."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.beta is not None and not 0 < self.beta < math.inf:
            raise ConfigError(f"beta must be > 0, got {self.beta}")
        if self.ref_dtype not in (None, *DTYPES):
            raise ConfigError(f"ref_dtype must be one of {', '.join(DTYPES)}, got {self.ref_dtype!r}", key="ref_dtype")
        if self.ref_dtype is not None and self.precompute_ref_log_probs:
            raise ConfigError("ref_dtype: with precompute_ref_log_probs no reference is held: leave one of them out")
        self.check_counts("precompute_ref_batch_size", "chunk_size")
        given = [n for n in ("precompute_ref_batch_size", "ref_log_probs_dir") if getattr(self, n) is not None]
        if given and not self.precompute_ref_log_probs:
            raise ConfigError(f"{', '.join(given)}: only with precompute_ref_log_probs")

    def holds_reference(self, adapter: bool) -> bool:
        """Whether a second model is held while the policy, or an adapter on it, is trained."""
        return not self.precompute_ref_log_probs and (self.ref_model_name_or_path is not None or not adapter)
