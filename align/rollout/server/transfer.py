"""How the weights of a push get to servers: through files, over the GPU that both are on, or by broadcast."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch

from align.config.addresses import LOOPBACK
from align.errors import RolloutError
from align.rollout.server import delivery
from align.rollout.server.client import Server
from align.rollout.server.group import Group, host_of, meeting_point, own_address
from align.rollout.server.packing import Block, Named, Outline, packs
from align.rollout.server.same_gpu import exported, gpu_of

Call = Callable[[delivery.Told, Callable[[], None]], None]


@dataclass(frozen=True)
class Piece:
    """Some tensors of a push. info(server): what it is told, so that it takes them. beside: what this process has to
    do at the same time."""

    info: delivery.Told
    beside: Callable[[], None] | None = None


class Transfer(ABC):
    """The sending side, in the process that pushes. The receiving one is `align.rollout.server.worker.Receiver`."""

    name: str
    hint: ClassVar[str] = ""  # behind the error of a push

    def meet(self, servers: list[Server], call: Call) -> None:  # noqa: B027
        """Before a push. call(info, beside): `/init_weight_transfer_engine` of all servers, with `beside` here."""

    @abstractmethod
    def pieces(self, weights: Iterable[Named]) -> Iterator[Piece]:
        """Each has been taken by all servers when the next one is asked for."""

    def finished(self) -> None:  # noqa: B027
        """After a push, whether it arrived or not."""

    def close(self) -> None:  # noqa: B027
        """At the end, and after a push that failed: the next one begins anew."""


class Files(Transfer):
    """Through a folder that trainer and servers share. keep: until the next push, for servers that come back."""

    name = "files"

    def __init__(self, folder: Path, keep: bool):
        self.folder, self.keep = folder, keep

    def pieces(self, weights):
        for file in delivery.chunks(weights, self.folder):
            yield Piece(partial(delivery.told_all, {"file": str(file)}))
            if not self.keep:
                file.unlink()


class SameGPU(Transfer):
    """From the trainer's memory on the GPU that all servers are on too: copied there, and nowhere else."""

    name = "ipc"
    hint = (
        ". If processes cannot share the GPU's memory here, as in containers of their own, set rollout.transfer: files"
    )

    def __init__(self, servers: list[Server]):
        self.block = Block(torch.device("cuda", torch.cuda.current_device()))
        self.servers, self.exported = servers, (0, 0)
        self.handles: dict[str, list] = {}

    def pieces(self, weights):
        for tensors in packs(weights, self.block.size):
            block, outline = self.block.pack(tensors)
            self._export(block)
            torch.cuda.synchronize()
            yield Piece(partial(self._told, outline))

    def _told(self, outline: Outline, server: Server) -> dict:
        return {"handle": self.handles[server.url], "outline": outline}

    def _export(self, block: torch.Tensor) -> None:
        """Once to each server, as long as it is the same memory."""
        memory = block.untyped_storage()
        if (where := (memory.data_ptr(), memory.nbytes())) != self.exported:
            self.exported = where
            self.handles = {server.url: exported(block) for server in self.servers}

    def finished(self) -> None:
        self.block.bytes, self.exported = None, (0, 0)
        torch.cuda.ipc_collect()


class Broadcast(Transfer):
    """To a group of this process and every worker of the servers, formed at the first push. backend: gloo, from memory
    of this machine's CPUs; nccl, from this process's GPU to others."""

    def __init__(self, backend: str, seconds: float):
        self.name = backend
        self.seconds = seconds
        self.group: Group | None = None
        self.block = Block("cpu" if backend == "gloo" else torch.device("cuda", torch.cuda.current_device()))

    def meet(self, servers, call) -> None:
        if self.group is not None:
            return
        hosts = [host_of(server.url) for server in servers]
        address = own_address(next((host for host in hosts if host not in LOOPBACK), hosts[0]))  # that all can reach
        store = meeting_point(address, self.seconds)
        size, first = 1, {}
        for server in servers:
            first[server.url], size = size, size + server.workers
        known = {"host": address, "port": store.port, "size": size, "backend": self.name, "seconds": self.seconds}

        def join() -> None:
            self.group = Group(self.name, store, 0, size, self.seconds, address)

        call(lambda server: {**known, "first_rank": first[server.url]}, join)

    def pieces(self, weights):
        group = self.group
        assert group is not None
        for tensors in packs(weights, self.block.size):
            block, outline = self.block.pack(tensors)
            yield Piece(
                partial(delivery.told_all, {"outline": outline, "size": block.numel()}), partial(group.broadcast, block)
            )

    def close(self) -> None:
        if self.group is not None:
            self.group.close()
            self.group = None


def make_transfer(kind: str, servers: list[Server], folder: Path, keep: bool, seconds: float, device) -> Transfer:
    """kind: of `rollout.transfer`. device: of the trainer's weights. Raises `RolloutError` for what cannot be here."""
    here = gpu_of(device)
    together = here is not None and all(gpus == [here] for gpus in (server.gpus for server in servers))
    if kind == "files" or (kind == "auto" and (keep or not together)):
        return Files(folder, keep)
    if kind in ("ipc", "auto"):
        if not together:
            raise RolloutError(
                f"rollout.transfer: ipc needs trainer and servers on one GPU; the trainer is on {here or 'a CPU'}, "
                f"{servers[0].url} on {', '.join(map(str, servers[0].gpus))}: set it to files, nccl or gloo"
            )
        return SameGPU(servers)
    if kind == "nccl":
        taken = [here, *(gpu for server in servers for gpu in server.gpus)]
        if None in taken or len(set(taken)) < len(taken):
            raise RolloutError(
                "rollout.transfer: nccl needs the trainer and every worker of the servers on a GPU of its own: set it "
                "to files or gloo"
            )
    return Broadcast(kind, seconds)
