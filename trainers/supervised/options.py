"""Options of supervised fine-tuning that say which weights and which tokens are trained, and by which loss."""

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
    implicit_reward_beta: float | None = field(
        default=None,
        metadata={
            "help": "UFT: train (sigmoid(implicit_reward_beta log(policy / reference)) - score)^2 of sequences, the "
            "score from the rows, or 1. Paper: 0.01. Default: the likelihood of each token."
        },
    )
    ref_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "The reference: with selective_tokens, a model trained on little text of the right kind; with "
            "implicit_reward_beta by default the policy as it starts (LoRA: the adapter off)."
        },
    )
    ref_dtype: str | None = field(
        default=None, metadata={"help": "bfloat16, float16 or float32: of the reference. Default: as the policy's."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.ref_dtype not in (None, *DTYPES):
            raise ConfigError(f"ref_dtype must be one of {', '.join(DTYPES)}, got {self.ref_dtype!r}", key="ref_dtype")
        given = [name for name in ("ref_model_name_or_path", "ref_dtype") if getattr(self, name) is not None]
        if given and self.selective_tokens is None and self.implicit_reward_beta is None:
            raise ConfigError(
                f"{given[0]}: supervised fine-tuning has a reference only with selective_tokens or "
                "implicit_reward_beta: set one of these too, or leave it out",
                key=given[0],
            )
        if self.selective_tokens is not None and self.implicit_reward_beta is not None:
            raise ConfigError(
                "selective_tokens trains some tokens of a sequence, and implicit_reward_beta is of the log-prob of the "
                "whole: leave one of the two out",
                key="implicit_reward_beta",
            )

    def holds_reference(self, adapter: bool) -> bool:
        """Whether a second model is held while the policy, or an adapter on it, is trained."""
        if self.implicit_reward_beta is None:
            return self.selective_tokens is not None
        return not adapter or self.ref_model_name_or_path is not None or self.ref_dtype is not None
