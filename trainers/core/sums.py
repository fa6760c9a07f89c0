"""How FSDP2 adds up gradients: over processes and micro-batches, in float32, in shards."""

from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator

HALVES = (torch.bfloat16, torch.float16)


def sum_gradients(accelerator: Accelerator, chosen: dict[str, Any] | None) -> None:
    """Before anything is sharded. chosen: the run's `gradient_accumulation_kwargs`.

    accelerate's mixed precision sums in the dtype that is computed in. In bfloat16 a sum of n gradients is rounded n
    times to 8 bits, and one of more than 256 of the same size stands still. And without `sync_each_batch`, which the
    run may set to false, each process keeps the whole gradients between the micro-batches of a step.
    """
    if not accelerator.is_fsdp2:
        return
    policy = accelerator.state.fsdp_plugin.mixed_precision_policy
    if policy is not None and policy.reduce_dtype in HALVES:
        accelerator.state.fsdp_plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32)
    if "sync_each_batch" not in (chosen or {}):
        accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True
