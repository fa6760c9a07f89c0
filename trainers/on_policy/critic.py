"""The critic of PPO: a network of its own that values each state, with its own optimiser and place in checkpoints."""

import copy
import logging
from pathlib import Path

import torch
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor

from align.errors import ConfigError, TrainingError
from align.modeling.load import disable_dropout, load_backbone
from align.modeling.logprobs import language_model
from align.modeling.pairs import pair_inputs

logger = logging.getLogger(__name__)

CRITIC_FILE = "critic.pt"


class Critic(nn.Module):
    """A transformer and a linear head without bias, one value per stream. The head starts at 0, so that the first
    advantages are the returns (as in OpenAI's code; Moskovitz et al. share the trunk between the heads likewise)."""

    def __init__(self, backbone: nn.Module, heads: int):
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
    """The critic prepared for training, with its optimiser: in one process, with DDP or with FSDP2."""

    def __init__(self, critic: Critic, accelerator, *, learning_rate: float, weight_decay: float, max_grad_norm: float):
        kind = str(accelerator.distributed_type).rpartition(".")[2]
        if kind == "DEEPSPEED" or (kind == "FSDP" and not accelerator.is_fsdp2):
            raise ConfigError(f"the critic of PPO is trained with DDP or FSDP2 or in one process, not under {kind}")
        self.max_grad_norm, self.learning_rate = max_grad_norm, learning_rate
        self.model = fsdp2_prepare_model(accelerator, critic) if kind == "FSDP" else accelerator.prepare_model(critic)
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
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def state_dict(self) -> dict:
        """Whole tensors in the main process, nothing in the others. All processes must call it."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        model, optimizer = get_state_dict(self.model, self.optimizer, options=options)
        return {"model": model, "optimizer": optimizer}

    def load(self, folder: str | Path) -> None:
        path = Path(folder) / CRITIC_FILE
        if not path.exists():
            raise TrainingError(f"{folder} has no {CRITIC_FILE}: it is not a checkpoint of PPO")
        state = torch.load(path, weights_only=True, map_location="cpu")
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=StateDictOptions(full_state_dict=True),
        )
