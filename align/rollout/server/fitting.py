"""What servers must have in common with the run that asks them, and with each other."""

from collections.abc import Iterable
from typing import Any

import aiohttp
import torch

from align.errors import RolloutError
from align.modeling.rotary import factors_for
from align.rollout.server.client import Server


async def check_fit(
    servers: list[Server],
    names: Iterable[str],
    dtype: torch.dtype,
    longest: int,
    config: Any,
    http: aiohttp.ClientSession,
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
        if (most := await server.longest(http)) < longest:
            raise RolloutError(
                f"the rollout server {server.url} takes {most} tokens of prompt and completion, this run "
                f"needs {longest}: start it with the config of this run"
            )
        if (theirs := factors_for(config, most)) != (ours := factors_for(config, longest)):
            raise RolloutError(
                f"the rollout server {server.url} takes {most} tokens and LongRoPE's factors for {theirs} sequences, "
                f"this run {longest} and those for {ours} ones: start it with the config of this run"
            )
