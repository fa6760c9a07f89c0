"""ReMax: REINFORCE whose baseline is the reward of the greedy completion (Li et al. 2023, arXiv 2310.10505)."""

from dataclasses import dataclass, field

from torch import Tensor

from align.errors import ConfigError
from align.objectives.advantages import remax_token_weights
from align.rollout.types import SamplingParams
from align.trainers.on_policy.config import OnPolicyConfig
from align.trainers.on_policy.loop import OnPolicyTrainer, Stream
from align.trainers.on_policy.rollouts import Sample


@dataclass
class ReMaxConfig(OnPolicyConfig):
    """Defaults: the exact gradient of `E[r] - beta KL(pi || ref)`. The released trainer's settings (one-step KL, gamma
    0.99, clip 5, token mean) are in configs/remax_released.yaml."""

    kl_mode: str = field(
        default="to_go",
        metadata={"help": "KL in a token's weight: to_go (summed over the tokens that follow), one_step or none."},
    )
    gamma: float = field(default=1.0, metadata={"help": "Discount of the reward towards earlier tokens."})
    reward_clip: float | None = field(
        default=None, metadata={"help": "Clip the difference between sampled and greedy reward to +- this."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.kl_mode not in ("to_go", "one_step", "none"):
            raise ConfigError(f"kl_mode must be to_go, one_step or none, got {self.kl_mode!r}")
        if not 0 < self.gamma <= 1:
            raise ConfigError(f"gamma must be in (0, 1], got {self.gamma}")


class ReMaxTrainer(OnPolicyTrainer):
    """Sampled and greedy requests go to the engine in one call; there is no critic."""

    def requests(self) -> list[SamplingParams]:
        greedy = SamplingParams(max_tokens=self.args.max_completion_length, temperature=0)
        return [*super().requests(), greedy]

    def set_baselines(self, samples: list[Sample], extra: list[list[Sample]]) -> None:
        for i, sample in enumerate(samples):
            (greedy,) = extra[i // self.args.num_generations]
            sample.baseline = greedy.score
            sample.baselines = self.weighting.scores(greedy.rewards)
            self.record("remax/greedy_reward", greedy.score)
            self.record("remax/advantage", sample.score - greedy.score)
            self.record("remax/same_as_greedy", sample.completion_ids == greedy.completion_ids)
            self.record("remax/length_minus_greedy", sample.length - greedy.length)

    def estimate(self, stream: Stream, place: int) -> Tensor:
        return remax_token_weights(
            stream.scores,
            stream.baselines,
            stream.logps,
            stream.ref_logps,
            stream.mask,
            beta=stream.beta,
            gamma=self.args.gamma,
            reward_clip=self.args.reward_clip,
            kl_mode=self.args.kl_mode,
        )
