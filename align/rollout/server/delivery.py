"""A push to servers: the calls that make a server take weights, and files with weights."""

import asyncio
import fcntl
import json
import shutil
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import aiohttp
from safetensors.torch import save_file
from torch import Tensor

from align.errors import RolloutError
from align.modeling.adapters import CONFIG_FILE, PREFIX, WEIGHTS_FILE
from align.rollout.adapters import A, B
from align.rollout.server.client import Server
from align.rollout.server.packing import packs

CHUNK = 1 << 30  # bytes of weights in one file
MIB = 1 << 20
SPARE = 4 * MIB  # of the folder, beside a file
Told = Callable[[Server], dict]  # what each server is told of a transfer
ARRIVING = " (arriving)"  # behind the label of weights that are not all there


def told_all(info: dict, server: Server) -> dict:
    return info


def chunks(weights: Iterable[tuple[str, Tensor]], folder: Path) -> Iterator[Path]:
    """Write `weights` to files of at most `CHUNK` bytes, unless one tensor is larger; give each when it is written."""
    for number, held in enumerate(packs(weights, CHUNK)):
        yield written(dict(held), folder, number)


def written(tensors: dict[str, Tensor], folder: Path, number: int) -> Path:
    path, size = folder / f"{number:05d}.safetensors", sum(tensor.nbytes for tensor in tensors.values())
    if (free := shutil.disk_usage(folder).free) < size + SPARE:
        raise RolloutError(
            f"{size / MIB:.0f} MiB of weights do not fit in {folder.parent}, where {free / MIB:.0f} MiB are free: name "
            "another transfer_folder"
        )
    save_file({name: apart(tensor) for name, tensor in tensors.items()}, path)
    return path


def apart(tensor: Tensor) -> Tensor:
    """In memory of its own: safetensors refuses tensors that share theirs."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor


@dataclass(frozen=True)
class Parcel:
    """What a push brings. label: of the weights, by which the server names them. whole: all weights of the model, and
    not an adapter alone. adapter: the folder of the adapter, in PEFT's format."""

    label: str
    whole: bool
    adapter: Path | None = None


async def begin(server: Server, http: aiohttp.ClientSession, parcel: Parcel) -> None:
    """From here until `finish`, the server says that its weights are arriving, and makes no completions."""
    if (await server.label(http)).endswith(ARRIVING):  # a push was interrupted: vLLM wants it ended first
        try:
            await server.call(http, "POST", "/finish_weight_update")
        except RolloutError as error:
            if "without a matching" not in str(error):
                raise
    await server.name_weights(http, parcel.label + ARRIVING)
    await server.call(http, "POST", "/pause?mode=abort")
    if parcel.whole:
        await server.call(http, "POST", "/start_weight_update")


async def meet(server: Server, http: aiohttp.ClientSession, told: Told) -> None:
    await server.call(http, "POST", "/init_weight_transfer_engine", {"init_info": told(server)})


async def send(server: Server, http: aiohttp.ClientSession, told: Told) -> None:
    await server.call(http, "POST", "/update_weights", {"update_info": told(server)})


async def finish(server: Server, http: aiohttp.ClientSession, parcel: Parcel) -> None:
    """An adapter has a new name with every push: vLLM would take the old one for the same name."""
    if parcel.whole:
        await server.call(http, "POST", "/finish_weight_update")
    if parcel.adapter is not None:
        for name in await server.adapter_names(http):
            await server.call(http, "POST", "/v1/unload_lora_adapter", {"lora_name": name})
        new = {"lora_name": parcel.label, "lora_path": str(parcel.adapter)}
        await server.call(http, "POST", "/v1/load_lora_adapter", new)
    await server.call(http, "POST", "/resume")  # first: vLLM 0.33 refuses requests until then, and a name invites them
    await server.name_weights(http, parcel.label)


async def deliver(server: Server, http: aiohttp.ClientSession, files: list[Path], parcel: Parcel) -> None:
    """A whole push of files that were kept."""
    await begin(server, http, parcel)
    for file in files:
        await send(server, http, partial(told_all, {"file": str(file)}))
    await finish(server, http, parcel)


def write_adapter(tensors: dict[str, Tensor], folder: Path) -> None:
    """The matrices of `adapter_weights`, which are scaled already, as PEFT saves an adapter."""
    folder.mkdir()
    named = {f"{PREFIX}{name}.weight": apart(tensor) for name, tensor in tensors.items()}
    save_file(named, folder / WEIGHTS_FILE)
    rank = max(tensor.shape[0] for name, tensor in tensors.items() if name.endswith(A))
    layers = sorted({name.removesuffix(A).removesuffix(B).rpartition(".")[2] for name in tensors})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": layers, "bias": "none"}
    (folder / CONFIG_FILE).write_text(json.dumps(config))


@asynccontextmanager
async def locked(path: Path, seconds: float) -> AsyncIterator[None]:
    """One process of a run at a time gives a server its weights back. Raises `RolloutError` after so many seconds in
    which another one has the turn: it may be stopped."""
    end = time.monotonic() + seconds
    with open(path, "a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > end:
                    raise RolloutError(
                        "another process of this run has been giving a rollout server its weights back for more than "
                        f"wait_limit ({seconds:g} seconds): it is stopped, or wait_limit is too low for these weights"
                    ) from error
                await asyncio.sleep(0.2)
        yield
