"""What servers must have in common with the run that asks them, and with each other."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from align.config.addresses import LOOPBACK
from align.errors import RolloutError
from align.modeling.rotary import factors_for
from align.rollout.adapters import lora_layers, why_merged
from align.rollout.server.client import Server
from align.rollout.server.group import host_of
from align.rollout.server.options import MEMORY

logger = logging.getLogger(__name__)

MERGED = (
    "the adapter is merged into the weights at each push, in float32, then cast to %s (%s). rollout/arrived_share says "
    "how much of it that leaves"
)


OF_NO_RESULT = {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache"}
"""Parts of a model's configuration that it does not compute with, or that are checked by themselves."""


def check_fit(
    servers: list[Server],
    names: Iterable[str],
    dtype: torch.dtype,
    longest: int,
    config: Any,
) -> None:
    """Raises `RolloutError` for servers that were not started for this run. names: of its checkpoint's tensors; dtype:
    of its rollouts; longest: tokens of prompt and completion; config: the model's."""
    first = servers[0]
    for server in servers:
        if server.parts.keys() != set(names) or server.parts != first.parts:
            raise RolloutError(
                f"the rollout server {server.url} was started for another model than this run trains, or "
                "otherwise than the first server: start it with `align serve` and the config of this run"
            )
        if server.dtype != str(dtype).removeprefix("torch."):
            raise RolloutError(
                f"the rollout server {server.url} computes in {server.dtype}, and this run in {dtype}: start "
                "it with the config of this run"
            )
        if server.device != first.device:
            raise RolloutError(
                f"the rollout server {server.url} runs on {server.device}, and {first.url} on "
                f"{first.device}: the servers of a run have devices of one kind"
            )
        if (most := server.longest) < longest:
            raise RolloutError(
                f"the rollout server {server.url} takes {most} tokens of prompt and completion, this run "
                f"needs {longest}: start it with the config of this run"
            )
        if (theirs := factors_for(config, most)) != (ours := factors_for(config, longest)):
            raise RolloutError(
                f"the rollout server {server.url} takes {most} tokens and LongRoPE's factors for {theirs} sequences, "
                f"this run {longest} and those for {ours} ones: start it with the config of this run"
            )


def check_as_before(server: Server, before: dict) -> None:
    """Raises `RolloutError` for a server that came back with another configuration of the model: what is drawn before
    the next push, at which it is probed, would be another model's with the run's weights. before: what it had, empty
    where it was not asked."""
    now = server.config
    changed = [
        name for name in sorted((before.keys() | now.keys()) - OF_NO_RESULT) if before.get(name) != now.get(name)
    ]
    if before and changed:
        shown = "; ".join(f"{name}: {before.get(name)!r:.80} before, {now.get(name)!r:.80} now" for name in changed)
        raise RolloutError(
            f"the rollout server {server.url} came back with another configuration of the model ({shown}): start it "
            "with the config of this run, as before"
        )


def takes_adapter(model, servers: list[Server], folder: Path, dtype: torch.dtype) -> bool:
    """Whether the model's adapter goes to the servers as an adapter, through `folder`; else it is merged, which is
    said."""
    if not isinstance(model, PeftModel):
        return False
    layers = [name for name, _, _ in lora_layers(model)] if (reason := why_merged(model)) is None else []
    for server in servers:
        if missing := [name for name in layers if name not in server.adapters]:
            reason = f"the rollout server {server.url} was started without room for adapters on {missing[0]}"
        if layers and folder.parent == Path(MEMORY) and host_of(server.url) not in LOOPBACK:
            reason = f"adapters go through files, and {server.url} shares no transfer_folder with this machine"
    if reason is not None:
        logger.warning(MERGED, dtype, reason)
    return reason is None
