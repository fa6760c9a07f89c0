"""What becomes of completions that were cut at the limit, or came near it (`SamplingOptions`)."""

from dataclasses import dataclass

from align.errors import ConfigError
from align.objectives.overlong import soft_overlong_punishment
from align.trainers.on_policy.samples import Sample
from align.trainers.on_policy.sampling_options import SamplingOptions
from align.trainers.weighting.base import Weighting


@dataclass(frozen=True)
class TruncationRule:
    """Applied to every scored completion, those of further requests (ReMax's greedy one) included.

    truncated: of `SamplingOptions`, as are the rest. missing_eos_penalty, overlong_penalty: units of the score, not
    multiplied by the rewards' weights.
    """

    truncated: str = "keep"
    missing_eos_penalty: float = 0.0
    longest: int = 0
    overlong_buffer: int | None = None
    overlong_penalty: float = 1.0

    @classmethod
    def of(cls, args: SamplingOptions) -> "TruncationRule":
        assert args.truncated is not None  # filled in when the configuration is made
        return cls(
            args.truncated,
            args.missing_eos_penalty or 0.0,
            args.max_completion_length,
            args.overlong_buffer,
            args.overlong_penalty,
        )

    @property
    def penalises(self) -> bool:
        return self.truncated == "penalise" or self.overlong_buffer is not None

    def check(self, weighting: Weighting) -> None:
        """ConfigError for a penalty that no stream of the weighting takes."""
        if self.penalises and not any(stream.penalty for stream in weighting.streams):
            raise ConfigError(
                "missing_eos_penalty and overlong_buffer are taken off the rewards of the task, and these constraints "
                "leave none (or multipliers.task_apart mixes them with their own): name task_rewards, or a reward that "
                "no constraint holds, or use truncated: mask; in a weighting of yours, give a StreamSpec penalty=1"
            )

    def apply(self, samples: list[Sample]) -> None:
        """Sets `penalty`, and takes it off `score`; `masked` and `left_out` of what is to be in no loss."""
        for sample in samples:
            sample.penalty = self.penalty(sample)
            sample.score -= sample.penalty
            if self.truncated == "mask" and sample.truncated and not sample.left_out:
                sample.masked = sample.left_out = True

    def penalty(self, sample: Sample) -> float:
        penalty = self.missing_eos_penalty if sample.truncated else 0.0
        if self.overlong_buffer is not None:
            penalty -= self.overlong_penalty * soft_overlong_punishment(
                sample.written, longest=self.longest, buffer=self.overlong_buffer
            )
        return penalty
