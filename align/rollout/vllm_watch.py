"""The limit of what processes do together in an engine that they share: none waits for another without end.

They meet in collectives that have no limit of their own (vLLM's in shared memory on CPUs, NCCL's on GPUs) and that
nothing can interrupt. So two threads of each process look on. One tells the others, by the run's store, where its
process is, and asks where they are. Where the store's keeper is stopped, that never returns; so the other thread, which
decides, asks nothing. Where nothing moves for too long it says who did not come, by what the first one has heard, and
ends the process; the launcher ends the others.
"""

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass
from typing import Any

import torch.distributed as dist

from align.distributed.ranks import lost
from align.errors import RolloutError
from align.rollout.vllm_requests import stepping

BEAT = 5.0  # seconds between two signs of life of a process, at most
SILENT = 60.0  # seconds without one, after which a process counts as stopped, at most
WORK = 1800.0  # seconds, at least, for work at which all are: the first start on a GPU compiles
ENDING = 10.0  # seconds to say why: nobody may read what is said


def limit() -> float:
    """Seconds: nine tenths of the timeout of the run's process group (`ddp_timeout`), whose own error names nobody."""
    group: Any = dist.group.WORLD
    return 0.9 * group._get_backend(group._device_types[0]).options._timeout.total_seconds()


def end_process(message: str) -> None:
    """With the status of an error that align raises, and where the main thread is. Nothing else can end it: inside a
    collective it hears no exception."""
    timer = threading.Timer(ENDING, os._exit, [2])
    timer.daemon = True
    timer.start()
    try:
        sys.stdout.flush()
        print(f"align: error: {message}", file=sys.stderr, flush=True)
        traceback.print_stack(sys._current_frames()[threading.main_thread().ident or 0])
    finally:
        os._exit(2)


@dataclass(frozen=True)
class Place:
    """Where a process is. count: of its steps so far. what: the last of them. inside: whether it is in it still."""

    count: int = 0
    what: str = ""
    inside: bool = False


@dataclass(frozen=True)
class Heard:
    """The last sign of life of a process. beats: their number. at: seconds of the clock of who heard it."""

    beats: int
    place: Place
    at: float


def told(rank: int, heard: Heard | None, own: Place, silent: bool) -> tuple[bool, str]:
    """Whether the others wait for this rank, and what is known of it. own: where the process is that waits. silent: no
    sign of life for long."""
    if heard is None:
        return True, f"process {rank} did not come: it has not begun to make this engine, or ended as it did"
    place = heard.place
    last = f"step {place.count}, {place.what}" if place.count else "no step"
    if silent:  # it may have gone on after its last sign
        return True, f"process {rank} gives no sign of life: it is stopped, or has ended (its last known: {last})"
    if place.count < own.count:
        return True, f"process {rank} did not come, and is busy with something else (its last: {last})"
    if place.count == own.count and place.inside:
        return False, f"process {rank} came, and waits too, or does not get on"
    return True, f"process {rank} came, and has left the step, as after an error"


def keeper() -> str:
    """Who keeps the store: with torchrun and `align launch` the launcher, else the first process."""
    by_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return "the launcher on the first machine" if by_launcher else "process 0 of the run"


class Watch:
    """Of the engine that these ranks of the run make now; all of them, in one order.

    Args:
        ranks: of all of them.
        rank: of this process.
        seconds: after which those have failed that others wait for in a step in which nothing moved.
        end: told what is wrong, by a thread of its own.
    """

    made = 0  # by this process

    def __init__(self, ranks: list[int], rank: int, seconds: float, end: Callable[[str], None] = end_process):
        self.ranks, self.rank, self.seconds, self.end = ranks, rank, seconds, end
        self.work = max(seconds, WORK)  # seconds where all are there
        self.silent = min(SILENT, seconds / 4)
        self._name, self._store = f"align_engine/{Watch.made}/{ranks[0]}", dist.distributed_c10d._get_default_store()
        Watch.made += 1
        self.here = Place()
        # Seconds in which this process has looked on: one that was stopped itself, and goes on, has not waited.
        self._clock = self._moved = 0.0
        self._heard: dict[int, Heard] = {}
        self._answered = 0.0  # when the store answered last
        self._closed = threading.Event()
        self._threads = [threading.Thread(target=act, daemon=True) for act in (self._look_on, self._talk)]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Before the interpreter ends, which a thread inside a call of the store would not outlive."""
        self._closed.set()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(1.0)

    def moved(self) -> None:
        """Something has been done: the limit is that of the next wait."""
        self._moved = self._clock

    @contextmanager
    def moving(self, llm_engine: Any) -> Iterator[None]:
        """While each step of vLLM's engine moves."""
        step = llm_engine.step

        def moved() -> list:
            self.moved()
            return step()

        with stepping(llm_engine, moved):
            yield

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        """Around what all ranks do together, in one order."""
        self.moved()
        self.here = Place(self.here.count + 1, what, inside=True)
        try:
            yield
        except RuntimeError as error:
            if "gloo" in str(error) or isinstance(error, dist.DistError):
                raise RolloutError(lost(what, error)) from error
            raise
        finally:
            self.here = Place(self.here.count, what, inside=False)

    # ---- the thread that decides -------------------------------------------------------------------------------------

    @property
    def _beat(self) -> float:
        return min(BEAT, self.seconds / 20)

    @property
    def _waited(self) -> float:
        return self._clock - self._moved if self.here.inside else 0.0

    def _look_on(self) -> None:
        before = time.monotonic()
        while not self._closed.wait(self._beat):
            now = time.monotonic()
            self._clock += min(now - before, 2 * self._beat)
            before = now
            here = self.here
            if self._waited <= self.seconds:
                continue
            missing, said = self._said(here)
            if self.here is here and self._waited > (self.seconds if missing else self.work):
                self.end(said)
                return

    def _said(self, here: Place) -> tuple[bool, str]:
        """Whether somebody is missing, and who."""
        head = (
            f"processes {', '.join(map(str, self.ranks))} share a vLLM engine, and process {self.rank} waited for "
            f"{self._waited:.1f} seconds (limit: {self.seconds:g}, by ddp_timeout) in step {here.count}, {here.what}: "
        )
        if self._clock - self._answered > self.silent:
            return True, f"{head}{keeper()}, by which they know of each other, is stopped or has ended"
        found = []
        for rank in self.ranks:
            heard = self._heard.get(rank)
            if rank != self.rank:
                found.append(told(rank, heard, here, heard is not None and self._clock - heard.at > self.silent))
        return any(missing for missing, _ in found), head + "; ".join(text for _, text in found)

    # ---- the thread that asks ----------------------------------------------------------------------------------------

    def _talk(self) -> None:
        with suppress(RuntimeError):  # the store has ended, which is said when the time is up
            default: Any = self._store
            store = dist.PrefixStore(self._name, default.clone())  # a connection that no wait of the run's blocks
            beats = 0
            while not self._closed.wait(self._beat):
                beats += 1
                store.set(str(self.rank), json.dumps([beats, *astuple(self.here)]))
                if self._waited > self.seconds / 2:
                    self._ask(store)

    def _ask(self, store: Any) -> None:
        for rank in self.ranks:
            if rank == self.rank or not store.check([str(rank)]):
                continue
            beats, *place = json.loads(store.get(str(rank)))
            last = self._heard.get(rank)
            if last is None or last.beats != beats:
                self._heard[rank] = Heard(beats, Place(*place), self._clock)
        self._answered = self._clock
