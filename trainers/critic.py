"""The critic of PPO: a network of its own that values each state, with its own optimiser and place in checkpoints."""

import copy
import logging
from pathlib import Path

import torch
from torch import Tensor, nn

from align.errors import ConfigError, TrainingError
from align.modeling.load import disable_dropout, load_backbone
from align.modeling.logprobs import language_model
from align.modeling.pairs import pair_inputs

logger = logging.getLogger(__name__)

FILE_NAME = "critic.pt"


class Critic(nn.Module):
    """A transformer and a linear head without bias, one value per stream. The head starts at 0, so that the first
    advantages are the returns (as in OpenAI's code; Moskovitz et al. share the trunk between the heads likewise)."""

    def __init__(self, backbone: nn.Module, heads: int):
        super().__init__()
        self.backbone = backbone
        width = backbone.config.get_text_config().hidden_size
        self.head = nn.Linear(width, heads, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Values of the states before each completion token, [B, L, heads], as `completion_logps`; float32."""
        hidden = self.backbone(**pair_inputs(self.backbone, batch)).last_hidden_state
        return self.head(hidden.flatten(0, 1)[batch["completion_sources"]].to(self.head.weight.dtype)).float()


def make_critic(policy: nn.Module, source: str | None, heads: int, *, gradient_checkpointing: bool) -> Critic:
    """The critic: the trunk of `source` (a folder or hub name; a reward model is usual), else of the policy."""
    if source is not None:
        backbone = load_backbone(source)
    elif hasattr(policy, "peft_config"):
        raise ConfigError(
            "a policy with an adapter needs critic_model_name_or_path: the critic is trained in full, and the adapted "
            "trunk cannot be its start. Name the model that training starts from, or a reward model"
        )
    else:
        backbone = copy.deepcopy(language_model(policy).base_model)
    backbone.requires_grad_(True).train()
    disable_dropout(backbone)
    if gradient_checkpointing:
        backbone.gradient_checkpointing_enable({"use_reentrant": False})
    return Critic(backbone, heads)


class CriticState:
    """The critic prepared for training, with its optimiser. DDP or one process; a critic is not sharded."""

    def __init__(self, critic: Critic, accelerator, *, learning_rate: float, weight_decay: float, max_grad_norm: float):
        kind = str(accelerator.distributed_type).rpartition(".")[2]
        if kind in ("FSDP", "DEEPSPEED"):
            raise ConfigError(f"the critic of PPO is trained with DDP or in one process, not under {kind}")
        self.accelerator, self.max_grad_norm, self.learning_rate = accelerator, max_grad_norm, learning_rate
        self.model = accelerator.prepare_model(critic)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=learning_rate, weight_decay=weight_decay, eps=1e-5, fused=False
        )

    def values(self, batch: dict[str, Tensor]) -> Tensor:
        return self.model(batch)

    def backward(self, loss: Tensor) -> None:
        if not torch.isfinite(loss):
            raise TrainingError(f"the critic's loss is {loss.item()}: lower critic_learning_rate")
        loss.backward()

    def step(self, scale: float) -> float:
        """One optimiser step at `scale` times the learning rate; returns the gradient norm before clipping."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * scale
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)

    def save(self, folder: str | Path) -> None:
        bare = self.accelerator.unwrap_model(self.model)
        torch.save({"model": bare.state_dict(), "optimizer": self.optimizer.state_dict()}, Path(folder) / FILE_NAME)

    def load(self, folder: str | Path) -> None:
        path = Path(folder) / FILE_NAME
        if not path.exists():
            raise TrainingError(f"{folder} has no {FILE_NAME}: it is not a checkpoint of PPO")
        state = torch.load(path, weights_only=True, map_location=self.accelerator.device)
        self.accelerator.unwrap_model(self.model).load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
