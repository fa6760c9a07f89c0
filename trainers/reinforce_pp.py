"""REINFORCE++: token-level REINFORCE with advantages whitened over the batch (Hu 2025, arXiv 2501.03262)."""

from dataclasses import dataclass, field

from torch import Tensor

from align.errors import ConfigError
from align.objectives.kl import k1
from align.objectives.returns import reward_to_go, token_rewards
from align.trainers.on_policy.config import OnPolicyConfig
from align.trainers.on_policy.loop import OnPolicyTrainer, Stream
from align.trainers.rloo import needs_groups


@dataclass
class ReinforcePPConfig(OnPolicyConfig):
    """Defaults: the published form. With `group_baseline` (REINFORCE++-baseline) the prompt's mean score is subtracted
    first, and the KL belongs in the loss."""

    group_baseline: bool = field(
        default=False, metadata={"help": "Subtract the mean score of the prompt's samples before whitening."}
    )
    gamma: float = field(default=1.0, metadata={"help": "Discount of rewards towards earlier tokens."})
    loss_aggregation: str = field(
        default="token_mean", metadata={"help": "token_mean, sequence_sum, sequence_mean or constant."}
    )

    @property
    def whitens(self) -> bool:
        return True

    def __post_init__(self):
        super().__post_init__()
        if self.group_baseline:
            needs_groups(self)
        if not 0 < self.gamma <= 1:
            raise ConfigError(f"gamma must be in (0, 1], got {self.gamma}")


class ReinforcePPTrainer(OnPolicyTrainer):
    """Whitening is over the tokens of the whole rollout, all processes included."""

    def estimate(self, stream: Stream, place: int) -> Tensor:
        scores = stream.scores
        if self.args.group_baseline:
            groups = scores.view(-1, self.args.num_generations)
            scores = (groups - groups.mean(-1, keepdim=True)).flatten()
        rewards = token_rewards(scores, k1(stream.logps, stream.ref_logps), stream.mask, beta=stream.beta)
        returns = reward_to_go(rewards, stream.mask, self.args.gamma)
        return self.whitened(returns, stream.mask)
