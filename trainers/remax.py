"""ReMax: REINFORCE whose baseline is the reward of the greedy completion (Li et al. 2023, arXiv 2310.10505)."""

from dataclasses import dataclass, field

from align.errors import ConfigError
from align.objectives.advantages import KLMode, remax_token_weights
from align.rollout.types import SamplingParams
from align.trainers.core.ranks import Ranks
from align.trainers.on_policy.config import ESTIMATOR_HELP, OnPolicyConfig
from align.trainers.on_policy.estimators import Estimate, Estimator, register_estimator
from align.trainers.on_policy.loop import OnPolicyTrainer
from align.trainers.on_policy.pipeline import ScoredRollout
from align.trainers.on_policy.streams import Stream


@register_estimator("remax")
@dataclass
class ReMax(Estimator):
    """Sampled and greedy requests go to the engine in one call; there is no critic."""

    num_generations: int
    kl_mode: KLMode
    gamma: float
    reward_clip: float | None

    def __post_init__(self):
        if self.kl_mode not in ("to_go", "one_step", "none"):
            raise ConfigError(f"kl_mode must be to_go, one_step or none, got {self.kl_mode!r}")
        if not 0 < self.gamma <= 1:
            raise ConfigError(f"gamma must be in (0, 1], got {self.gamma}")

    def requests(self, sampling: SamplingParams) -> list[SamplingParams]:
        return [sampling, SamplingParams(max_tokens=sampling.max_tokens, temperature=0)]

    def estimate(self, stream: Stream, ranks: Ranks) -> Estimate:
        assert stream.extra_scores is not None  # of the greedy request
        greedy = stream.extra_scores[:, 0].repeat_interleave(self.num_generations)
        advantages = remax_token_weights(
            stream.scores,
            greedy,
            stream.logps,
            stream.ref_logps,
            stream.mask,
            beta=stream.beta,
            gamma=self.gamma,
            reward_clip=self.reward_clip,
            kl_mode=self.kl_mode,
        )
        return Estimate(advantages)

    def metrics(self, rollout: ScoredRollout) -> dict[str, list[float]]:
        pairs = [
            (sample, rollout.extra[i // self.num_generations][0])
            for i, sample in enumerate(rollout.samples)
            if not sample.left_out
        ]
        return {
            "remax/greedy_reward": [greedy.score for _, greedy in pairs],
            "remax/advantage": [sample.score - greedy.score for sample, greedy in pairs],
            "remax/same_as_greedy": [sample.completion_ids == greedy.completion_ids for sample, greedy in pairs],
            "remax/length_minus_greedy": [sample.written - greedy.written for sample, greedy in pairs],
        }


@dataclass
class ReMaxConfig(OnPolicyConfig):
    """Defaults: the exact gradient of `E[r] - beta KL(pi || ref)`. The released trainer's settings (one-step KL, gamma
    0.99, clip 5, token mean) are in configs/remax_released.yaml."""

    estimator: str = field(default="remax", metadata=ESTIMATOR_HELP)
    kl_mode: str = field(
        default="to_go",
        metadata={
            "help": "KL in a token's weight: to_go (summed over those that follow), one_step, or none with beta: 0."
        },
    )
    gamma: float = field(default=1.0, metadata={"help": "Discount of the reward towards earlier tokens."})
    reward_clip: float | None = field(
        default=None, metadata={"help": "Clip the difference between sampled and greedy reward to +- this."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.kl_mode == "one_step" and (self.kl_in == "loss" or not self.beta):
            raise ConfigError("kl_mode: one_step is of the KL in the reward: set kl_in: reward, and a beta above 0")
        if self.kl_mode == "none" and self.kl_in == "reward" and self.beta:
            raise ConfigError(
                f"kl_mode: none trains on no KL, and beta is {self.beta:g}, which would do nothing: set beta: 0 too",
                key="beta",
            )


class ReMaxTrainer(OnPolicyTrainer):
    """One policy, and one more, greedy, completion per prompt."""

    _tag_names = ["align", "remax"]
    paper = "Li et al. 2023, arXiv 2310.10505"
    config_class = ReMaxConfig
