"""Options that say which completions are drawn, and what becomes of those that were cut at the limit."""

from dataclasses import dataclass, field
from typing import Any

from align.config.types import take_types
from align.errors import ConfigError
from align.rollout.types import SamplingParams
from align.trainers.on_policy.environments import EnvironmentOptions
from align.trainers.on_policy.trl_names import DRAWN, TrlOnPolicyOptions, take_generation_kwargs, take_turns

TRUNCATED = ("keep", "mask", "penalise", "bootstrap")


@dataclass
class SamplingOptions(EnvironmentOptions, TrlOnPolicyOptions):
    """Mixed into the configuration of on-policy methods."""

    max_completion_length: int = field(default=256, metadata={"help": "Completions are cut here (tokens)."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature; log-probs are taken at it too."})
    top_p: float = field(
        default=1.0, metadata={"help": "Draw from the smallest set of tokens that has this probability; 1: off."}
    )
    top_k: int = field(default=0, metadata={"help": "Draw from the so many most likely tokens; 0: off."})
    min_p: float | None = field(
        default=0.0,
        metadata={"help": "Draw no token less likely than this share of the most likely one's probability; 0: off."},
    )
    repetition_penalty: float = field(
        default=1.0,
        metadata={
            "help": "Divide the positive logits of tokens that the prompt or the completion has already by this, and "
            "multiply the negative ones, when completions are drawn; 1: off. Needs rollout_correction."
        },
    )
    truncated: str | None = field(
        default=None,
        metadata={
            "help": "What becomes of completions that are cut at max_completion_length. keep: trained on like others; "
            "mask: in no loss and in no baseline; penalise: missing_eos_penalty is subtracted from their score; "
            "bootstrap (PPO): the critic's value after the last token takes the place of their score. Default: keep, "
            "or penalise where missing_eos_penalty is set."
        },
    )
    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "Subtracted from the score of a completion that is cut; above 0."}
    )
    overlong_buffer: int | None = field(
        default=None,
        metadata={
            "help": "DAPO's soft overlong punishment: over the last so many tokens below max_completion_length a "
            "completion's score falls linearly, by overlong_penalty in all."
        },
    )
    overlong_penalty: float = field(
        default=1.0, metadata={"help": "With overlong_buffer: what the longest completions lose."}
    )

    dynamic_sampling_rounds: int = field(
        default=0,
        metadata={
            "help": "DAPO's dynamic sampling: prompts whose samples all have one score are replaced by others, at most "
            "so many times per rollout; 0: off."
        },
    )

    @property
    def drawing(self) -> dict[str, Any]:
        """Arguments of `SamplingParams` for a sampled completion."""
        return {"max_tokens": self.max_completion_length, **{name: getattr(self, name) for name in DRAWN}}

    def __post_init__(self):
        take_types(self)  # generation_kwargs may be JSON
        take_generation_kwargs(self)
        take_turns(self)
        super().__post_init__()
        self.min_p = self.min_p or 0.0  # TRL's None is off
        SamplingParams(**self.drawing)  # which checks them
        check_truncated(self)
        if self.dynamic_sampling_rounds < 0:
            raise ConfigError(f"dynamic_sampling_rounds must be 0 (off) or above, got {self.dynamic_sampling_rounds}")


def check_truncated(args: SamplingOptions) -> None:
    """Raises `ConfigError`; fills in the default of `truncated`."""
    penalty = args.missing_eos_penalty
    if args.mask_truncated_completions:
        if args.truncated not in (None, "mask"):
            raise ConfigError(
                f"mask_truncated_completions is TRL's name of truncated: mask, and truncated: {args.truncated} is "
                "given: leave one of them out"
            )
        args.truncated = "mask"
    if penalty is not None and not penalty > 0:
        raise ConfigError(f"missing_eos_penalty is subtracted from the score and must be above 0, got {penalty}")
    if args.truncated is None:
        args.truncated = "keep" if penalty is None else "penalise"
    if args.truncated not in TRUNCATED:
        raise ConfigError(f"truncated must be one of {', '.join(TRUNCATED)}, got {args.truncated!r}")
    if args.truncated == "penalise" and penalty is None:
        raise ConfigError("truncated: penalise needs missing_eos_penalty, what a cut completion's score loses")
    if args.truncated != "penalise" and penalty is not None:
        raise ConfigError(
            f"missing_eos_penalty does nothing with truncated: {args.truncated}: leave one of them out (with both "
            "left to missing_eos_penalty, it is truncated: penalise)"
        )
    longest, buffer = args.max_completion_length, args.overlong_buffer
    if buffer is not None and not 1 <= buffer <= longest:
        raise ConfigError(f"overlong_buffer must be 1 to max_completion_length ({longest}) tokens, got {buffer}")
    if not args.overlong_penalty > 0 or (args.overlong_penalty != 1 and buffer is None):
        raise ConfigError(
            f"overlong_penalty ({args.overlong_penalty}) must be above 0, and needs overlong_buffer, over which the "
            "score falls"
        )
