"""PPO with a critic (Schulman et al. 2017, arXiv 1707.06347; Ouyang et al. 2022, arXiv 2203.02155)."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import TrainerCallback

from align.errors import ConfigError
from align.modeling.prefix_support import enable_trunk
from align.objectives.kl import k1, masked_mean
from align.objectives.policy_loss import aggregate_tokens, value_losses
from align.objectives.returns import gae, token_rewards
from align.trainers.on_policy.config import OnPolicyConfig
from align.trainers.on_policy.critic import CRITIC_FILE, CriticState, make_critic
from align.trainers.on_policy.loop import OnPolicyTrainer, Stream
from align.trainers.on_policy.rollouts import Sample


@dataclass
class PPOConfig(OnPolicyConfig):
    """The rollout is gone over `num_iterations` times in `num_mini_batches` optimiser steps each."""

    num_iterations: int = field(default=4, metadata={"help": "Passes over each rollout (PPO's epochs)."})
    gamma: float = field(default=1.0, metadata={"help": "Discount."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of generalised advantage estimation."})
    whiten_advantages: bool = field(
        default=True, metadata={"help": "Mean 0 and deviation 1 over the tokens of the rollout, per stream."}
    )
    loss_aggregation: str = field(
        default="token_mean", metadata={"help": "token_mean, sequence_sum, sequence_mean or constant."}
    )
    critic_model_name_or_path: str | None = field(
        default=None, metadata={"help": "What the critic's trunk starts from. Default: a copy of the policy's."}
    )
    critic_learning_rate: float = field(
        default=1e-5, metadata={"help": "Learning rate of the critic; it follows the policy's schedule."}
    )
    critic_warmup_steps: int = field(
        default=0, metadata={"help": "Optimiser steps in which only the critic is trained."}
    )
    value_clip: float | None = field(
        default=0.2, metadata={"help": "Clip of the value's change in a rollout; null: the plain squared error."}
    )

    @property
    def whitens(self) -> bool:
        return self.whiten_advantages

    def __post_init__(self):
        super().__post_init__()
        if not (0 < self.gamma <= 1 and 0 <= self.lam <= 1):
            raise ConfigError(f"gamma must be in (0, 1] and lam in [0, 1], got {self.gamma} and {self.lam}")
        if self.critic_learning_rate <= 0 or self.critic_warmup_steps < 0:
            raise ConfigError("critic_learning_rate must be above 0, critic_warmup_steps not negative")
        if self.value_clip is not None and self.value_clip <= 0:
            raise ConfigError(f"value_clip must be above 0 or null, got {self.value_clip}")


class PPOTrainer(OnPolicyTrainer):
    """The critic is a second network with one head per stream, its own optimiser and a squared error on the returns."""

    def __init__(self, model, reward, args: PPOConfig, *positional, **options):
        super().__init__(model, reward, args, *positional, **options)
        critic = make_critic(
            self.model,
            args.critic_model_name_or_path,
            len(self.weighting.streams),
            gradient_checkpointing=args.gradient_checkpointing,
        )
        if self.shares_prefixes:
            longest = args.max_prompt_length + args.max_completion_length
            self.shares_prefixes = self.may_share(enable_trunk(critic.backbone, self.model, longest))
        self.critic = CriticState(
            critic.to(args.device),
            self.accelerator,
            learning_rate=args.critic_learning_rate,
            weight_decay=args.weight_decay,
            max_grad_norm=args.max_grad_norm,
        )
        self.add_callback(CriticStep(self))

    # ---- what PPO plugs into the loop -------------------------------------------------------------------------------

    @torch.no_grad()
    def fill_values(self, samples: list[Sample]) -> None:
        size = self.args.train_batch_size * self.args.num_generations
        with self.phase("values"):
            for part in self.cut(samples, max(1, -(-len(samples) // size))):
                batch = self._prepare_inputs(self.collate(part))
                with self.accelerator.autocast():
                    self.give(part, "values", self.critic.values(batch))

    def estimate(self, stream: Stream, place: int) -> Tensor:
        rewards = token_rewards(stream.scores, k1(stream.logps, stream.ref_logps), stream.mask, beta=stream.beta)
        advantages, returns = gae(rewards, stream.values, stream.mask, gamma=self.args.gamma, lam=self.args.lam)
        self.stream_returns.append(returns)
        self.record_fit(returns, stream, self.weighting.streams[place])
        return self.whitened(advantages, stream.mask) if self.args.whiten_advantages else advantages

    def record_fit(self, returns: Tensor, stream: Stream, name: str) -> None:
        """1 - mean squared error of the critic / variance of the returns, over all processes."""
        returns, values, mask = (self.everywhere(x) for x in (returns, stream.values, stream.mask))
        error = masked_mean((returns - values).square(), mask)
        spread = masked_mean((returns - masked_mean(returns, mask)).square(), mask)
        self.record(f"critic/explained_variance/{name}", 1 - error / spread.clamp(min=1e-8))

    def fill_advantages(self, samples: list[Sample]) -> None:
        self.stream_returns: list[Tensor] = []
        super().fill_advantages(samples)
        for sample, row in zip(samples, torch.stack(self.stream_returns, dim=-1), strict=True):
            sample.returns = row[: sample.length]

    def further_loss(self, batch: dict[str, Tensor], normalizer: Tensor | None) -> None:
        mask = batch["completion_mask"]
        with self.phase("critic"), self.accelerator.autocast():
            values = self.critic.values(batch)
        losses, clipped = value_losses(
            values, batch["values"], batch["returns"], mask[..., None], clip=self.args.value_clip
        )
        losses = losses.mean(-1)
        how = self.args.loss_aggregation
        loss = aggregate_tokens(losses, mask, how, normalizer) * self.accelerator.num_processes
        self.record("critic/loss", masked_mean(losses.detach(), mask), mask.sum())
        self.record("critic/clip_ratio", masked_mean(clipped.float().mean(-1), mask), mask.sum())
        self.record("critic/value", masked_mean(values.detach().mean(-1), mask), mask.sum())
        with self.phase("critic"):
            self.critic.backward(loss)

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def save_further_files(self, folder) -> None:
        state = self.critic.state_dict()
        if self.args.should_save:
            torch.save(state, folder / CRITIC_FILE)

    def load_state(self, state: dict) -> None:
        super().load_state(state)
        self.critic.load(self.resume_folder)


class CriticStep(TrainerCallback):
    """Steps the critic with the policy, and holds the policy still while the critic warms up."""

    def __init__(self, trainer: PPOTrainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        trainer = self.trainer
        scheduler = trainer.lr_scheduler
        scale = scheduler.get_last_lr()[0] / args.learning_rate if args.learning_rate else 1.0
        trainer.record("critic/grad_norm", trainer.critic.step(scale))
        if state.global_step < args.critic_warmup_steps:
            for parameter in trainer.model.parameters():
                parameter.grad = None  # an optimiser passes over what has no gradient, decay included
