"""GRPO: scores relative to the prompt's group (Shao et al. 2024, arXiv 2402.03300), and its variants."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from align.errors import ConfigError
from align.objectives.groups import Scale, group_deviation, group_relative
from align.trainers.core.ranks import Ranks
from align.trainers.on_policy.config import ESTIMATOR_HELP, OnPolicyConfig
from align.trainers.on_policy.estimators import Estimate, Estimator, register_estimator
from align.trainers.on_policy.groups import needs_groups, penalised
from align.trainers.on_policy.loop import OnPolicyTrainer
from align.trainers.on_policy.streams import Stream

SCALES = get_args(Scale)
AGGREGATED = ("sum_then_normalize", "normalize_then_sum")


@register_estimator("grpo")
@dataclass
class GRPO(Estimator):
    """Group-relative advantages without a critic. `groups/<stream>_without_variance` is the share of prompts that teach
    nothing, because their samples' scores are all the same."""

    num_generations: int
    scale_rewards: Scale

    def __post_init__(self):
        needs_groups(self.num_generations)
        if self.scale_rewards not in SCALES:
            raise ConfigError(f"scale_rewards must be one of {', '.join(SCALES)}, got {self.scale_rewards!r}")

    @property
    def cancels_scale(self) -> bool:
        return self.scale_rewards != "none"

    def estimate(self, stream: Stream, ranks: Ranks) -> Estimate:
        scores = penalised(stream)
        groups = ranks.gather(scores).view(-1, self.num_generations)
        counted = ranks.gather(stream.mask.amax(-1)).view_as(groups) > 0
        kept = None if counted.all() else counted
        without = (group_deviation(groups, kept) == 0).float().mean().item()
        advantages = group_relative(groups, scale=self.scale_rewards, kept=kept)
        advantages = advantages.flatten()[ranks.local_slice(len(scores))]
        return Estimate(
            advantages[:, None] * stream.mask, metrics={f"groups/{stream.name}_without_variance": [without]}
        )


@dataclass
class GRPOConfig(OnPolicyConfig):
    """Defaults: the paper's (standardised in the group, mean of sequence means, k3 in the loss). Dr. GRPO:
    scale_rewards: none and loss_aggregation: constant. DAPO: epsilon_high: 0.28 and loss_aggregation: token_mean."""

    estimator: str = field(default="grpo", metadata=ESTIMATOR_HELP)
    num_generations: int = field(default=8, metadata={"help": "Sampled completions per prompt and rollout."})
    scale_rewards: Literal["group", "batch", "none", True, False] = field(
        default="group",
        metadata={
            "help": "Divide by the deviation of the group, of the batch, or not: none. true: group; false: none."
        },
    )
    loss_aggregation: str = field(
        default="sequence_mean",
        metadata={"help": "sequence_mean (GRPO), token_mean (DAPO), constant (Dr. GRPO) or sequence_sum."},
    )
    multi_objective_aggregation: str = field(
        default="sum_then_normalize",
        metadata={
            "help": "normalize_then_sum: every reward is compared with the group's apart, and their weighted sum is "
            "divided by its deviation over the rollout (GDPO, arXiv 2601.05242); sum_then_normalize: the other way."
        },
    )
    kl_in: str = field(default="loss", metadata={"help": "loss, as published, or reward."})
    kl_estimator: str = field(default="k3", metadata={"help": "With kl_in: loss. k3 as published, or k2."})

    def __post_init__(self):
        if isinstance(self.scale_rewards, bool):
            self.scale_rewards = "group" if self.scale_rewards else "none"
        super().__post_init__()
        if self.multi_objective_aggregation not in AGGREGATED:
            raise ConfigError(
                f"multi_objective_aggregation must be one of {', '.join(AGGREGATED)}, got "
                f"{self.multi_objective_aggregation!r}"
            )
        if self.multi_objective_aggregation == "normalize_then_sum":
            check_decoupled(self)


def check_decoupled(args: GRPOConfig) -> None:
    """ConfigError for what GDPO's separate comparisons leave no place for."""
    found = {
        "constraints or dynamic_weights, which weigh the rewards otherwise": args.constraints or args.dynamic_weights,
        "kl_in: reward: set kl_in: loss": args.kl_in == "reward" and args.beta,
        "missing_eos_penalty or overlong_buffer: put them into a reward": args.truncated == "penalise"
        or args.overlong_buffer,
        "scale_rewards other than group": args.scale_rewards != "group",
    }
    for what, given in found.items():
        if given:
            raise ConfigError(
                f"multi_objective_aggregation: normalize_then_sum goes without {what}",
                key="multi_objective_aggregation",
            )


class GRPOTrainer(OnPolicyTrainer):
    """One policy, groups of `num_generations` completions."""

    _tag_names = ["align", "trl", "grpo"]
    paper = "Shao et al. 2024, arXiv 2402.03300"
    config_class = GRPOConfig
