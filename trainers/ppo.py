"""PPO with a critic (Schulman et al. 2017, arXiv 1707.06347; Ouyang et al. 2022, arXiv 2203.02155)."""

from dataclasses import dataclass, field

from torch import Tensor

from align.errors import ConfigError
from align.objectives.kl import k1, masked_mean
from align.objectives.returns import gae, token_rewards
from align.trainers.core.ranks import Ranks
from align.trainers.on_policy.config import ESTIMATOR_HELP, OnPolicyConfig
from align.trainers.on_policy.critic import CriticOptions
from align.trainers.on_policy.estimators import Estimate, Estimator, register_estimator
from align.trainers.on_policy.loop import OnPolicyTrainer
from align.trainers.on_policy.streams import Stream


@register_estimator("ppo")
@dataclass
class PPO(Estimator):
    """Generalised advantage estimation with the values of a critic, which has one head per stream."""

    gamma: float
    lam: float
    whiten_advantages: bool

    needs_values = True

    def __post_init__(self):
        if not (0 < self.gamma <= 1 and 0 <= self.lam <= 1):
            raise ConfigError(f"gamma must be in (0, 1] and lam in [0, 1], got {self.gamma} and {self.lam}")

    @property
    def whitens(self) -> bool:
        return self.whiten_advantages

    def estimate(self, stream: Stream, ranks: Ranks) -> Estimate:
        assert stream.values is not None  # needs_values
        rewards = token_rewards(stream.scores, k1(stream.logps, stream.ref_logps), stream.mask, beta=stream.beta)
        advantages, returns = gae(
            rewards, stream.values, stream.mask, gamma=self.gamma, lam=self.lam, last_values=stream.last_values
        )
        if self.whiten_advantages:
            advantages = ranks.whiten(advantages, stream.mask)
        explained = explained_variance(returns, stream.values, stream.mask, ranks)
        return Estimate(advantages, returns, {f"critic/explained_variance/{stream.name}": explained})


def explained_variance(returns: Tensor, values: Tensor, mask: Tensor, ranks: Ranks) -> list[float]:
    """[1 - mean squared error of the critic / variance of the returns], over all processes; empty where all samples are
    left out."""
    returns, values, mask = (ranks.gather(x) for x in (returns, values, mask))
    if not mask.any():
        return []
    error = masked_mean((returns - values).square(), mask)
    spread = masked_mean((returns - masked_mean(returns, mask)).square(), mask)
    return [(1 - error / spread.clamp(min=1e-8)).item()]


@dataclass
class PPOConfig(CriticOptions, OnPolicyConfig):
    """Every rollout is trained on in `num_iterations` passes of `num_mini_batches` optimiser steps."""

    estimator: str = field(default="ppo", metadata=ESTIMATOR_HELP)
    num_iterations: int = field(default=4, metadata={"help": "Passes over each rollout (PPO's epochs)."})
    gamma: float = field(default=1.0, metadata={"help": "Discount."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of generalised advantage estimation."})
    whiten_advantages: bool = field(
        default=True, metadata={"help": "Mean 0 and deviation 1 over the tokens of the rollout, per stream."}
    )
    loss_aggregation: str = field(
        default="token_mean", metadata={"help": "token_mean, sequence_sum, sequence_mean or constant."}
    )


class PPOTrainer(OnPolicyTrainer):
    """A policy and a critic: a second network with its own optimiser, and a squared error on the returns."""

    _tag_names = ["align", "trl", "ppo"]
    paper = "Schulman et al. 2017, arXiv 1707.06347"
    config_class = PPOConfig
