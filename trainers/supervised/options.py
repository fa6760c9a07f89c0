"""Options of supervised fine-tuning that say which weights and which tokens are trained."""

from dataclasses import dataclass, field

from align.errors import ConfigError
from align.trainers.core.eval_completions import EvalCompletionsOptions
from align.trainers.pairs.config import DTYPES


@dataclass
class SupervisedOptions(EvalCompletionsOptions):
    half_finetuning: int | None = field(
        default=None,
        metadata={
            "help": "Number of a round of half fine-tuning (HFT), from 0: half of each layer's weights, drawn by seed "
            "and round, stay what they are. Default: all are trained."
        },
    )
    selective_tokens: float | None = field(
        default=None,
        metadata={
            "help": "Rho-1: train this share of each step's completion tokens, those whose loss is most above that of "
            "the reference (ref_model_name_or_path). Paper: 0.6 or 0.7. Default: all are trained."
        },
    )
    ref_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "With selective_tokens: the reference, a model trained on little text of the right kind."},
    )
    ref_dtype: str | None = field(
        default=None, metadata={"help": "bfloat16, float16 or float32: of the reference. Default: as the policy's."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.ref_dtype not in (None, *DTYPES):
            raise ConfigError(f"ref_dtype must be one of {', '.join(DTYPES)}, got {self.ref_dtype!r}", key="ref_dtype")
        given = [name for name in ("ref_model_name_or_path", "ref_dtype") if getattr(self, name) is not None]
        if given and self.selective_tokens is None:
            raise ConfigError(
                f"{given[0]}: supervised fine-tuning has a reference only with selective_tokens: set that too, or "
                "leave it out",
                key=given[0],
            )

    def holds_reference(self, adapter: bool) -> bool:
        """Whether a second model is held while the policy, or an adapter on it, is trained."""
        return self.selective_tokens is not None
