"""The critic of PPO: a separate value network with its own optimiser and its own file in checkpoints."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from transformers import TrainerCallback

from align.distributed.fsdp2 import prepare_fsdp2
from align.distributed.shells import copied
from align.errors import ConfigError, TrainingError
from align.modeling.dropout import disable_dropout
from align.modeling.load import load_backbone
from align.modeling.logprobs import language_model
from align.modeling.pairs import pair_inputs
from align.modeling.text_part import freeze_unreached
from align.modeling.types import Model
from align.objectives.kl import masked_mean
from align.objectives.policy_loss import aggregate_tokens, value_losses
from align.trainers.core import beside
from align.trainers.core.hooks import TrainingSettings
from align.trainers.core.recorder import Recorder
from align.trainers.core.resumed import own_settings

logger = logging.getLogger(__name__)

CRITIC_FILE = "critic.pt"


class Critic(nn.Module):
    """A transformer and a linear head without bias, one value per stream. The head starts at 0, so that the first
    advantages are the returns (as in OpenAI's code; Moskovitz et al. share the trunk between the heads likewise)."""

    def __init__(self, backbone: Model, heads: int):
        super().__init__()
        self.backbone = backbone
        self._no_split_modules = backbone._no_split_modules  # what FSDP wraps
        width = backbone.config.get_text_config().hidden_size
        self.head = nn.Linear(width, heads, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Values of the states before each completion token, [B, L, heads], as `completion_logps`; float32."""
        hidden = self.backbone(**pair_inputs(self.backbone, batch)).last_hidden_state
        return self.head(hidden.flatten(0, 1)[batch["completion_sources"]].to(self.head.weight.dtype)).float()


@dataclass
class CriticOptions(TrainingSettings):
    """Options of a configuration whose estimator needs a critic."""

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
        default=None,
        metadata={
            "help": "Clip of the value's change in a rollout, in units of the return. Default: none, as a critic that "
            "starts at 0 gets no further than this per rollout (0.2 is for returns scaled to a deviation of 1)."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.critic_learning_rate <= 0 or self.critic_warmup_steps < 0:
            raise ConfigError("critic_learning_rate must be above 0, critic_warmup_steps not negative")
        if self.value_clip is not None and self.value_clip <= 0:
            raise ConfigError(f"value_clip must be above 0 or null, got {self.value_clip}")


def make_critic(policy: Model, args: Any, *, heads: int) -> Critic:
    """The critic of a configuration with `CriticOptions`: the trunk of `critic_model_name_or_path` (a folder or hub
    name; a reward model is usual), else of the policy."""
    if not isinstance(args, CriticOptions):
        raise ConfigError(
            f"estimator {args.estimator!r} needs a critic, and {type(args).__name__} has no options of one: use "
            "PPOConfig, or a configuration with CriticOptions"
        )
    if args.critic_model_name_or_path is not None:
        backbone = load_backbone(args.critic_model_name_or_path, sharded=True)
    elif hasattr(policy, "peft_config"):
        raise ConfigError(
            "a policy with an adapter needs critic_model_name_or_path: the critic is trained in full, and the adapted "
            "trunk cannot be its start. Name the model that training starts from, or a reward model"
        )
    else:
        backbone = copied(language_model(policy).base_model)
    freeze_unreached(backbone.requires_grad_(True).train())
    disable_dropout(backbone)
    if args.gradient_checkpointing:
        backbone.gradient_checkpointing_enable({"use_reentrant": False})
    return Critic(backbone, heads)


class CriticLearner:
    """The critic prepared for training, with its loss and its optimiser: in one process, with DDP or with FSDP2.

    Args:
        args: a configuration with `CriticOptions`.
    """

    def __init__(self, critic: Critic, accelerator: Accelerator, args, recorder: Recorder):
        kind = str(accelerator.distributed_type).rpartition(".")[2]
        if kind == "DEEPSPEED" or (kind == "FSDP" and not accelerator.is_fsdp2):
            raise ConfigError(f"the critic of PPO is trained with DDP or FSDP2 or in one process, not under {kind}")
        self.accelerator, self.args, self.recorder = accelerator, args, recorder
        if kind == "FSDP":  # the whole critic never lies on one device
            self.model = prepare_fsdp2(accelerator, critic)
        else:
            self.model = accelerator.prepare_model(critic.to(accelerator.device))
        groups = beside.groups(self.model, args.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=args.critic_learning_rate, eps=1e-5, fused=False)

    def values(self, batch: dict[str, Tensor]) -> Tensor:
        """As `Critic.forward`."""
        with self.accelerator.autocast():
            return self.model(batch)

    def learn(self, batch: dict[str, Tensor], normalizer: Tensor | None) -> None:
        """Add the gradient of the squared error on this micro-batch's returns. normalizer: of the step's loss, counted
        over all processes (`aggregate_tokens`)."""
        mask = batch["completion_mask"]
        with self.recorder.phase("critic"):
            values = self.values(batch)
        losses, clipped = value_losses(
            values, batch["values"], batch["returns"], mask[..., None], clip=self.args.value_clip
        )
        losses = losses.mean(-1)
        loss = aggregate_tokens(losses, mask, self.args.loss_aggregation, normalizer) * self.accelerator.num_processes
        if mask.any():  # else all of its samples are left out
            self.record(losses.detach(), clipped, values.detach(), mask)
        if not torch.isfinite(loss):
            raise TrainingError(f"the critic's loss is {loss.item()}: lower critic_learning_rate")
        with self.recorder.phase("critic"):
            beside.backward(loss, self.accelerator)

    def record(self, losses: Tensor, clipped: Tensor, values: Tensor, mask: Tensor) -> None:
        tokens = mask.sum()
        self.recorder.record("critic/loss", masked_mean(losses, mask), tokens)
        self.recorder.record("critic/clip_ratio", masked_mean(clipped.float().mean(-1), mask), tokens)
        self.recorder.record("critic/value", masked_mean(values.mean(-1), mask), tokens)

    def step(self, scale: float) -> None:
        """One optimiser step at `scale` times the learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.critic_learning_rate * scale
        norm = beside.step(self.model.parameters(), self.optimizer, self.accelerator, self.args.max_grad_norm)
        if norm is not None:
            self.recorder.record("critic/grad_norm", norm)

    def save(self, folder: Path) -> None:
        """All processes must call it; the main one writes."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        model, optimizer = get_state_dict(self.model, self.optimizer, options=options)
        if self.args.should_save:
            torch.save({"model": model, "optimizer": optimizer}, folder / CRITIC_FILE)

    def load(self, folder: str | Path) -> None:
        path = Path(folder) / CRITIC_FILE
        if not path.exists():
            raise TrainingError(f"{folder} has no {CRITIC_FILE}: it is not a checkpoint of PPO")
        state = torch.load(path, weights_only=True, map_location="cpu")
        with own_settings(self.optimizer):
            set_state_dict(
                self.model,
                self.optimizer,
                model_state_dict=state["model"],
                optim_state_dict=state["optimizer"],
                options=StateDictOptions(full_state_dict=True),
            )


class CriticStep(TrainerCallback):
    """Steps the critic with the policy; while the critic warms up, the policy is not updated. began: the step at which
    both were new."""

    def __init__(self, critic: CriticLearner, began: Callable[[], int]):
        self.critic, self.began = critic, began

    def on_train_begin(self, args, state, control, **kwargs):
        if 0 < state.max_steps <= args.critic_warmup_steps:
            logger.warning(
                "critic_warmup_steps is %d and the run has %d steps: the critic alone is trained, and the policy stays "
                "as it is",
                args.critic_warmup_steps,
                state.max_steps,
            )

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.critic.step(share_of_start(optimizer))
        if state.global_step - self.began() < args.critic_warmup_steps:
            for parameter in model.parameters():
                parameter.grad = None  # an optimiser passes over what has no gradient, decay included


def share_of_start(optimizer: Any) -> float:
    """Where a schedule is: the learning rate now over the one that it began from, which is the optimiser's own (a
    user's has another than `learning_rate`)."""
    group = optimizer.param_groups[0]
    start = group.get("initial_lr", optimizer.defaults["lr"])  # the first of a schedule, which a plateau's is not
    return float(group["lr"] / start) if start else 1.0
