"""RLOO: REINFORCE whose baseline is the mean score of the prompt's other samples (Ahmadian et al. 2024, 2402.14740)."""

from dataclasses import dataclass, field

from align.objectives.groups import leave_one_out
from align.trainers.core.ranks import Ranks
from align.trainers.on_policy.config import ESTIMATOR_HELP, OnPolicyConfig
from align.trainers.on_policy.estimators import Estimate, Estimator, register_estimator
from align.trainers.on_policy.groups import needs_groups, penalised
from align.trainers.on_policy.loop import OnPolicyTrainer
from align.trainers.on_policy.streams import Stream


@register_estimator("rloo")
@dataclass
class RLOO(Estimator):
    """Sequence-level policy gradient without a critic."""

    num_generations: int

    def __post_init__(self):
        needs_groups(self.num_generations)

    def estimate(self, stream: Stream, ranks: Ranks) -> Estimate:
        scores = penalised(stream).view(-1, self.num_generations)
        kept = None if stream.kept is None else stream.kept.view_as(scores)
        return Estimate(leave_one_out(scores, kept).reshape(-1, 1) * stream.mask)


@dataclass
class RLOOConfig(OnPolicyConfig):
    """With kl_in: reward the KL is part of the score, and so of the baseline, as in TRL and verl."""

    estimator: str = field(default="rloo", metadata=ESTIMATOR_HELP)
    num_generations: int = field(default=2, metadata={"help": "Sampled completions per prompt and rollout."})


class RLOOTrainer(OnPolicyTrainer):
    """One policy, `num_generations` completions per prompt."""

    config_class = RLOOConfig
