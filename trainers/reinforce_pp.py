"""REINFORCE++: token-level REINFORCE with advantages whitened over the batch (Hu 2025, arXiv 2501.03262)."""

from dataclasses import dataclass, field

from align.errors import ConfigError
from align.objectives.groups import centred
from align.objectives.kl import k1
from align.objectives.returns import reward_to_go, token_rewards
from align.trainers.core.ranks import Ranks
from align.trainers.on_policy.config import ESTIMATOR_HELP, OnPolicyConfig
from align.trainers.on_policy.estimators import Estimate, Estimator, register_estimator
from align.trainers.on_policy.groups import needs_groups
from align.trainers.on_policy.loop import OnPolicyTrainer
from align.trainers.on_policy.streams import Stream


@register_estimator("reinforce_pp")
@dataclass
class ReinforcePP(Estimator):
    """Whitening is over the tokens of the whole rollout, all processes included."""

    num_generations: int
    group_baseline: bool
    gamma: float

    def __post_init__(self):
        if self.group_baseline:
            needs_groups(self.num_generations)
        if not 0 < self.gamma <= 1:
            raise ConfigError(f"gamma must be in (0, 1], got {self.gamma}")

    @property
    def whitens(self) -> bool:
        return True

    def estimate(self, stream: Stream, ranks: Ranks) -> Estimate:
        scores = stream.scores
        if self.group_baseline:
            groups, kept = scores.view(-1, self.num_generations), stream.kept
            scores = centred(groups, None if kept is None else kept.view_as(groups)).flatten()
        rewards = token_rewards(scores, k1(stream.logps, stream.ref_logps), stream.mask, beta=stream.beta)
        returns = reward_to_go(rewards, stream.mask, self.gamma)
        return Estimate(ranks.whiten(returns, stream.mask))


@dataclass
class ReinforcePPConfig(OnPolicyConfig):
    """Defaults: the published form. With `group_baseline` (REINFORCE++-baseline) the prompt's mean score is subtracted
    first, and the KL belongs in the loss."""

    estimator: str = field(default="reinforce_pp", metadata=ESTIMATOR_HELP)
    group_baseline: bool = field(
        default=False, metadata={"help": "Subtract the mean score of the prompt's samples before whitening."}
    )
    gamma: float = field(default=1.0, metadata={"help": "Discount of rewards towards earlier tokens."})
    loss_aggregation: str = field(
        default="token_mean", metadata={"help": "token_mean, sequence_sum, sequence_mean or constant."}
    )


class ReinforcePPTrainer(OnPolicyTrainer):
    """One policy; one completion per prompt is enough."""

    _tag_names = ["align", "reinforce_pp"]
    paper = "REINFORCE++; Hu 2025, arXiv 2501.03262"
    config_class = ReinforcePPConfig
