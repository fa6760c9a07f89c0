"""`sync_ref_model`: a reference that follows the policy (TR-DPO, Gorbatovski et al. 2024, arXiv 2404.09656)."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from transformers import TrainerCallback

from align.distributed.shards import reshard
from align.errors import ConfigError, TrainingError
from align.modeling.load import Reference
from align.trainers.core.hooks import TrainingSettings

FILE_NAME = "reference.pt"


@dataclass
class MovingReferenceOptions(TrainingSettings):
    sync_ref_model: bool = field(
        default=False, metadata={"help": "Mix the policy into the reference every ref_model_sync_steps (TR-DPO)."}
    )
    ref_model_mixup_alpha: float = field(
        default=0.6, metadata={"help": "With sync_ref_model: the policy's share of the new reference; 1 replaces it."}
    )
    ref_model_sync_steps: int = field(default=512, metadata={"help": "With sync_ref_model: optimiser steps between."})

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.ref_model_mixup_alpha <= 1:
            raise ConfigError(
                f"ref_model_mixup_alpha must be above 0 and at most 1, got {self.ref_model_mixup_alpha}",
                key="ref_model_mixup_alpha",
            )
        if self.ref_model_sync_steps < 1:
            raise ConfigError(
                f"ref_model_sync_steps counts from 1, got {self.ref_model_sync_steps}", key="ref_model_sync_steps"
            )
        for name in ("ref_model_mixup_alpha", "ref_model_sync_steps"):
            if not self.sync_ref_model and getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ConfigError(f"{name}: only with sync_ref_model: true", key=name)


def moving_reference(trainer: Any) -> "MovingReference | None":
    """Of a trainer whose options ask for one, among its callbacks; None without. ConfigError where it cannot move."""
    if not (isinstance(trainer.args, MovingReferenceOptions) and trainer.args.sync_ref_model):
        return None
    if trainer.is_deepspeed_enabled:
        raise ConfigError("sync_ref_model does not work under DeepSpeed: use fsdp2", key="sync_ref_model")
    moving = MovingReference(trainer.args, trainer.reference, trainer.model)
    trainer.add_callback(moving)
    return moving


class MovingReference(TrainerCallback):
    """After every `ref_model_sync_steps` optimiser steps: reference <- alpha * policy + (1 - alpha) * reference."""

    def __init__(self, args: MovingReferenceOptions, reference: Reference | None, policy: nn.Module):
        if reference is None or reference.adapter_off or reference.model is policy:
            raise ConfigError(
                "sync_ref_model: there is no reference of its own that could move: there is none, or it is the policy "
                "with its adapter off; train in rounds then, each with the merged model of the last one",
                key="sync_ref_model",
            )
        self.reference, self.alpha, self.every = reference, args.ref_model_mixup_alpha, args.ref_model_sync_steps
        if [p.shape for p in self.reference.model.parameters()] != [p.shape for p in policy.parameters()]:
            raise ConfigError(
                f"sync_ref_model: the reference ({type(reference.model).__name__}) and the policy "
                f"({type(policy).__name__}) have different weights, which cannot be mixed",
                key="sync_ref_model",
            )
        if {p.dtype for p in self.reference.model.parameters()} & {torch.bfloat16, torch.float16}:
            raise ConfigError(
                "sync_ref_model: a reference in 16 bits rounds small changes away: leave ref_dtype out, or load it in "
                "float32",
                key="sync_ref_model",
            )

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every:
            return
        reshard(self.reference.model)
        reshard(model)
        with torch.no_grad():  # shards of the same places under FSDP2
            for old, new in zip(self.reference.model.parameters(), model.parameters(), strict=True):
                old.lerp_(new.detach().to(old.dtype), self.alpha)

    def save(self, folder: Path, *, writes: bool) -> None:
        """All processes must call it; the one that `writes` does."""
        weights = get_model_state_dict(
            self.reference.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )
        if writes:
            torch.save(weights, folder / FILE_NAME)

    def load(self, folder: str | Path) -> None:
        path = Path(folder) / FILE_NAME
        if not path.exists():
            raise TrainingError(f"{folder} has no {FILE_NAME}: it is no checkpoint of a run with sync_ref_model")
        weights = torch.load(path, weights_only=True, map_location="cpu")
        set_model_state_dict(self.reference.model, weights, options=StateDictOptions(full_state_dict=True))
