"""GRPO: scores relative to the prompt's group (Shao et al. 2024, arXiv 2402.03300), and its variants."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from align.errors import ConfigError
from align.objectives.groups import group_relative
from align.trainers.on_policy.config import OnPolicyConfig
from align.trainers.on_policy.loop import OnPolicyTrainer, Stream
from align.trainers.rloo import needs_groups, penalised

SCALES = ("group", "batch", "none")


@dataclass
class GRPOConfig(OnPolicyConfig):
    """Defaults: the paper's (standardised in the group, mean of sequence means, k3 in the loss). Dr. GRPO:
    scale_rewards: none and loss_aggregation: constant. DAPO: epsilon_high: 0.28 and loss_aggregation: token_mean."""

    num_generations: int = field(default=8, metadata={"help": "Sampled completions per prompt and rollout."})
    scale_rewards: str = field(
        default="group", metadata={"help": "Divide by the deviation of the group, of the batch, or not: none."}
    )
    loss_aggregation: str = field(
        default="sequence_mean",
        metadata={"help": "sequence_mean (GRPO), token_mean (DAPO), constant (Dr. GRPO) or sequence_sum."},
    )
    kl_in: str = field(default="loss", metadata={"help": "loss, as published, or reward."})
    kl_estimator: str = field(default="k3", metadata={"help": "With kl_in: loss. k3 as published, or k2."})

    @property
    def cancels_scale(self) -> bool:
        return self.scale_rewards != "none"

    def __post_init__(self):
        super().__post_init__()
        needs_groups(self)
        if self.scale_rewards not in SCALES:
            raise ConfigError(f"scale_rewards must be one of {', '.join(SCALES)}, got {self.scale_rewards!r}")


class GRPOTrainer(OnPolicyTrainer):
    """Group-relative advantages without a critic."""

    def estimate(self, stream: Stream, place: int) -> Tensor:
        scores = penalised(stream)
        everyone = self.everywhere(scores).view(-1, self.args.num_generations)
        self.record_groups(everyone, self.weighting.streams[place])
        advantages = group_relative(everyone, scale=self.args.scale_rewards).flatten()
        return advantages[self.own_rows(len(scores))][:, None] * stream.mask

    def record_groups(self, scores: Tensor, name: str) -> None:
        """How many prompts teach nothing, because their samples' scores are all the same."""
        self.record(f"groups/{name}_without_variance", torch.mean((scores.std(-1) == 0).float()))
