"""RLOO: REINFORCE whose baseline is the mean score of the prompt's other samples (Ahmadian et al. 2024, 2402.14740)."""

from dataclasses import dataclass, field

from torch import Tensor

from align.errors import ConfigError
from align.objectives.groups import leave_one_out
from align.objectives.kl import masked_sum
from align.trainers.on_policy.config import OnPolicyConfig
from align.trainers.on_policy.loop import OnPolicyTrainer, Stream


@dataclass
class RLOOConfig(OnPolicyConfig):
    """With kl_in: reward the KL is part of the score, and so of the baseline, as in TRL and verl."""

    num_generations: int = field(default=2, metadata={"help": "Sampled completions per prompt and rollout."})

    def __post_init__(self):
        super().__post_init__()
        needs_groups(self)


class RLOOTrainer(OnPolicyTrainer):
    """Sequence-level policy gradient without a critic."""

    def estimate(self, stream: Stream, place: int) -> Tensor:
        scores = penalised(stream).view(-1, self.args.num_generations)
        return leave_one_out(scores).reshape(-1, 1) * stream.mask


def penalised(stream: Stream) -> Tensor:
    """score - beta * sum_t k1, [N]."""
    return stream.scores - stream.beta * masked_sum(stream.logps - stream.ref_logps, stream.mask)


def needs_groups(config: OnPolicyConfig) -> None:
    if config.num_generations < 2:
        raise ConfigError(
            f"num_generations is {config.num_generations}: a baseline of the prompt's own samples needs at least 2. "
            "ReMax works with one"
        )
