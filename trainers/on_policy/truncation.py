"""What becomes of completions that were cut at the limit, or came near it (`SamplingOptions`)."""

from dataclasses import dataclass

from align.objectives.overlong import soft_overlong_punishment
from align.trainers.on_policy.samples import Sample
from align.trainers.on_policy.sampling_options import SamplingOptions


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
                sample.length, longest=self.longest, buffer=self.overlong_buffer
            )
        return penalty
