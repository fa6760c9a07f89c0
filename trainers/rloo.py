"""RLOO: REINFORCE whose baseline is the mean score of the prompt's other samples (Ahmadian et al. 2024, 2402.14740)."""

from dataclasses import dataclass, field, replace

from align.errors import ConfigError
from align.objectives.groups import leave_one_out
from align.trainers.core.ranks import Ranks
from align.trainers.on_policy.config import ESTIMATOR_HELP, OnPolicyConfig
from align.trainers.on_policy.estimators import Estimate, Estimator, register_estimator
from align.trainers.on_policy.groups import needs_groups, penalised
from align.trainers.on_policy.loop import OnPolicyTrainer
from align.trainers.on_policy.streams import EPSILON, Stream


@register_estimator("rloo")
@dataclass
class RLOO(Estimator):
    """Sequence-level policy gradient without a critic."""

    num_generations: int
    normalize_advantages: bool = False
    reward_clip_range: tuple[float, float] | None = None

    def __post_init__(self):
        needs_groups(self.num_generations)
        limits = self.reward_clip_range
        if limits is not None and not (len(limits) == 2 and limits[0] < limits[1]):
            raise ConfigError(f"reward_clip_range is the lowest and the highest score, got {limits!r}")

    @property
    def whitens(self) -> bool:
        return self.normalize_advantages

    def estimate(self, stream: Stream, ranks: Ranks) -> Estimate:
        if self.reward_clip_range is not None:
            low, high = self.reward_clip_range
            stream = replace(stream, scores=stream.scores.clamp(low, high))
        scores = penalised(stream).view(-1, self.num_generations)
        kept = None if stream.kept is None else stream.kept.view_as(scores)
        advantages = leave_one_out(scores, kept).flatten()
        if self.normalize_advantages:
            counted = stream.mask.amax(-1) > 0
            of_all = ranks.gather(advantages)[ranks.gather(counted)]
            if len(of_all) > 1:  # an only one has no deviation, and no others to be compared with: its advantage is 0
                advantages = (advantages - of_all.mean()) / (of_all.std() + EPSILON)
        return Estimate(advantages[:, None] * stream.mask)


@dataclass
class RLOOConfig(OnPolicyConfig):
    """With kl_in: reward the KL is part of the score, and so of the baseline, as in TRL and verl."""

    estimator: str = field(default="rloo", metadata=ESTIMATOR_HELP)
    normalize_advantages: bool = field(
        default=False,
        metadata={"help": "Give the advantages mean 0 and deviation 1 over the rollout, as TRL's option."},
    )
    reward_clip_range: tuple[float, float] | None = field(
        default=None, metadata={"help": "Lowest and highest score; the KL penalty comes after. Default: not clipped."}
    )
    num_generations: int = field(default=2, metadata={"help": "Sampled completions per prompt and rollout."})


class RLOOTrainer(OnPolicyTrainer):
    """One policy, `num_generations` completions per prompt."""

    _tag_names = ["align", "trl", "rloo"]
    paper = "Ahmadian et al. 2024, arXiv 2402.14740"
    config_class = RLOOConfig
