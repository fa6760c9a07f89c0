"""What DeepSpeed's ZeRO needs beside what accelerate and transformers do for it."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from align.distributed.shards import is_zero3
from align.errors import ConfigError, TrainingError
from align.trainers.core.hooks import TrainerHooks

LATEST = "latest"
"""The file of a checkpoint that DeepSpeed has written."""


class UnderDeepSpeed(TrainerHooks):
    """Of every trainer."""

    args: Any

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.is_deepspeed_enabled:
            _check_clipping(self.accelerator.state.deepspeed_plugin.deepspeed_config, self.args.max_grad_norm)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_deepspeed_enabled:
            _hold_in_one_dtype(self.model, self.accelerator.state.deepspeed_plugin.hf_ds_config.dtype())
        return super().train(*args, **kwargs)

    def _prepare_input(self, data: Any) -> Any:
        """As transformers', which rounds to bfloat16 what is not for the model too (log-probs of the reference,
        advantages, margins): of a log-prob of -300 nats it leaves steps of 2."""
        if self.is_deepspeed_enabled and isinstance(data, Tensor):
            return data.to(self.args.device)
        return super()._prepare_input(data)


def _check_clipping(settings: dict, max_grad_norm: float) -> None:
    """ConfigError where a file of DeepSpeed's own leaves `max_grad_norm` without effect. (Where it names another
    number, transformers says so.)"""
    if max_grad_norm > 0 and "gradient_clipping" not in settings:
        raise ConfigError(
            f"max_grad_norm {max_grad_norm} would have no effect: DeepSpeed clips by the entry gradient_clipping of "
            'its own file, which has none. Add "gradient_clipping": "auto" to it, or set max_grad_norm: 0',
            key="max_grad_norm",
        )


def _hold_in_one_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Before ZeRO-3 lays what is trained in one buffer, which it does for one dtype alone: an adapter, a head or masks
    in float32 that were added to a model in bfloat16 are computed with in bfloat16 too, as under ZeRO-2. What the
    optimiser updates is a copy in float32. dtype: what DeepSpeed computes in."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if not is_zero3(model.parameters()) or len({p.dtype for p in trained}) < 2:
        return
    for parameter in trained:
        if not is_zero3([parameter]):  # those were loaded in it
            parameter.data = parameter.data.to(dtype)


def check_processes(folder: str | Path, wrote: int, processes: int) -> None:
    """TrainingError where other processes than those that wrote DeepSpeed's states would read them."""
    if wrote != processes and (Path(folder) / LATEST).exists():
        raise TrainingError(
            f"{folder} was written by {wrote} processes with DeepSpeed, whose states {processes} cannot read: resume "
            f"with {wrote}, or begin a new run, in another output_dir, from its weights"
        )
