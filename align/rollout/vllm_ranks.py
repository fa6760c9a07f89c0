"""One vLLM engine in several ranks of the trainer, each of which holds a slice of its weights (tensor parallelism).

vLLM calls it `external_launcher`: every rank has an engine of its own with one worker, and as all of them get the same
requests, they schedule the same and meet in the layers' collectives. So all ranks of a group ask together, for what any
of them wants, and each takes its own back.
"""

import hashlib
import uuid
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from align.errors import ConfigError, RolloutError
from align.rollout.types import Completion, OnDone, Request
from align.rollout.vllm_watch import Watch, limit

SHARED_MEMORY = Path("/dev/shm")


class SharingRanks:
    """The consecutive ranks that share an engine with this one.

    Args:
        size: their number. Raises `ConfigError` where the processes of the run cannot be cut into groups of it.
    """

    def __init__(self, size: int):
        world = dist.get_world_size() if dist.is_initialized() else 1
        if world % size:
            raise ConfigError(
                f"rollout.tensor_parallel: {size} shares an engine between {size} processes of the run, which has "
                f"{world}: start it with a multiple of {size} (align launch CONFIG --num-processes {size})",
                key="rollout.tensor_parallel",
            )
        self.size, self.place = size, dist.get_rank() % size
        first = dist.get_rank() - self.place
        self.watch = Watch(list(range(first, first + size)), dist.get_rank(), limit())
        weakref.finalize(self, self.watch.close)  # of an engine that nobody closes

    def gather(self, value: Any) -> list:
        """The values of the ranks, in order."""
        from vllm.distributed import get_tp_group

        values: list = [None] * self.size
        dist.all_gather_object(values, value, group=get_tp_group().cpu_group)
        return values

    def complete(
        self,
        requests: list[Request],
        answer: Callable[[list[Request], OnDone | None], list[list[Completion]]],
        done: OnDone | None = None,
    ) -> list[list[Completion]]:
        """The completions of this rank's requests. answer: of the engine, to those of all ranks. done: of its own."""
        with self.watch.step("completions"):
            asked = self.gather(requests)
            start = sum(map(len, asked[: self.place]))

            def own(index: int, completions: list[Completion]) -> None:
                if done is not None and start <= index < start + len(requests):
                    done(index - start, completions)

            made = answer([request for each in asked for request in each], own if done is not None else None)
            ids = [completion.token_ids for group in made for completion in group]
            digests = self.gather(hashlib.blake2b(repr(ids).encode()).digest())
        if len(set(digests)) > 1:
            raise RolloutError(
                "the ranks that share a vLLM engine drew different tokens: their slices no longer compute together. "
                "Set rollout.tensor_parallel: 1, or use a server"
            )
        return made[start : start + len(requests)]

    @contextmanager
    def meeting(self) -> Iterator[None]:
        """While vLLM starts. On CPUs its ranks meet in shared memory, whose name would be the same in every run on this
        machine, and its files stay when a rank is killed: the next run could not start. So the name is this run's own,
        and the files go as soon as all ranks have them open."""
        from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

        run: list[Any] = [uuid.uuid4().hex]
        dist.broadcast_object_list(run)
        named, given = _CPUSHMDistributed.make_group_name, set()

        def own(communicator) -> str:
            given.add(f"{named(communicator)}-{run[0]}")
            return f"{named(communicator)}-{run[0]}"

        _CPUSHMDistributed.make_group_name = staticmethod(own)
        try:
            yield
        finally:
            _CPUSHMDistributed.make_group_name = staticmethod(named)
            for name in given:
                for rank in range(self.size):
                    (SHARED_MEMORY / f"{name.lstrip('/')}_{rank}").unlink(missing_ok=True)

    def options(self, cache: int | None) -> dict[str, Any]:
        """What vLLM is started with besides. cache: bytes of keys and values that this rank has room for; None where
        vLLM finds it out. All ranks get the least, since they must schedule alike."""
        found: dict[str, Any] = {
            "tensor_parallel_size": self.size,
            "distributed_executor_backend": "external_launcher",
        }
        rooms: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(rooms, cache)
        return found if cache is None else found | {"kv_cache_memory_bytes": min(rooms)}
