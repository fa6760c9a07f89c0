"""A process group of one trainer and the workers of its servers, apart from the groups that either has of its own."""

import socket
import time
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch.distributed as dist
from torch import Tensor

from align.errors import RolloutError

Store = dist.TCPStore
DISCARD = 9  # a port: connecting a datagram socket to it sends nothing


def own_address(other: str) -> str:
    """The address of this machine from which `other` (a host) is reached. Nothing is sent."""
    family, kind, _, _, place = socket.getaddrinfo(other, DISCARD, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(place)
        return probe.getsockname()[0]


def host_of(url: str) -> str:
    return urlsplit(url).hostname or ""


def meeting_point(address: str, seconds: float) -> Store:
    """The store through which the members find each other, at `address` alone and a free port."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as listener:
        listener.bind((address, 0))
        listener.listen()
        port = listener.getsockname()[1]
        return Store(
            address, port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=seconds),
            master_listen_fd=listener.detach(),
        )  # fmt: skip


class Group:
    """Member `rank` of `size`: 0 is the trainer, from which everything is sent. backend: gloo (memory of CPUs) or nccl
    (between GPUs). Making it waits for all members. Every wait ends after `seconds` with a `RolloutError`."""

    def __init__(self, backend: str, store: Store, rank: int, size: int, seconds: float, address: str):
        self.backend, self.seconds = backend, seconds
        self._store = store  # lives as long as the group
        self._inside = False  # a thread is in a call of the backend, and may be left there
        limit = timedelta(seconds=seconds)
        try:
            if backend == "gloo":
                gloo: Any = dist.ProcessGroupGloo
                options = gloo._Options()
                options._timeout = limit
                options._devices = [gloo.create_device(hostname=address)]
                self._members = gloo(store, rank, size, options)
            else:
                nccl: Any = dist.ProcessGroupNCCL
                options = nccl.Options()
                options._timeout = 10 * limit  # torch's own watchdog would end the process: `broadcast` is before it
                self._members = nccl(store, rank, size, options)
        except (RuntimeError, AttributeError) as error:  # the second of a torch whose private options have other names
            raise RolloutError(
                f"trainer and servers could not form a group over {backend}: {error}. Other ways for the weights: "
                "rollout.transfer: files, and on one GPU ipc"
            ) from error

    def broadcast(self, block: Tensor) -> None:
        """The trainer's block, to all. On the device that the backend moves."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        end = time.monotonic() + self.seconds
        self._inside = True
        try:
            work = self._members.broadcast([block], options)
            if self.backend == "gloo":
                work.wait()
                return
            while not work.is_completed():
                if time.monotonic() > end:
                    self._members.abort()
                    raise RolloutError(f"weights were not broadcast within {self.seconds:g} seconds")
                time.sleep(0.0005)
            work.wait()  # an error of NCCL is raised here
        except RuntimeError as error:
            raise RolloutError(f"weights could not be broadcast over {self.backend}: {error}") from error
        finally:
            self._inside = False

    def close(self) -> None:
        if self.backend == "nccl" and not self._inside:  # abort would wait for the call
            self._members.abort()
        del self._members, self._store
