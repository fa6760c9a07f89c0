"""Work beside this thread: in threads, or on the event loop of async functions, some at a time, results in order."""

import asyncio
import functools
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any

from align.errors import RewardError


class Workers(ABC):
    """Takes work, and does at most so much of it at a time. It begins in the order in which it is given."""

    @abstractmethod
    def begin(self, work: Callable[[], Any]) -> Future: ...

    @abstractmethod
    def stop(self, *, wait: bool) -> None:
        """Nothing more is begun. wait: until what has begun is done."""


class Threads(Workers):
    def __init__(self, limit: int):
        self.pool = ThreadPoolExecutor(limit, thread_name_prefix="rewards")

    def begin(self, work: Callable[[], Any]) -> Future:
        return self.pool.submit(work)

    def stop(self, *, wait: bool) -> None:
        self.pool.shutdown(wait=wait, cancel_futures=True)


class OnLoop(Workers):
    """Awaits what work returns.

    All calls of a process share one event loop in a thread of its own, so that clients which users keep between calls
    stay on their loop, and so that this works where a loop runs already (notebooks).
    """

    def __init__(self, limit: int):
        self.gate = asyncio.Semaphore(limit)

    def begin(self, work: Callable[[], Awaitable]) -> Future:
        async def gated() -> Any:
            async with self.gate:
                return await work()

        return asyncio.run_coroutine_threadsafe(gated(), _loop(os.getpid()))

    def stop(self, *, wait: bool) -> None:
        """The futures were cancelled, and with them what is awaited."""


Place = tuple[int, int]  # of a piece of work, in the order of which results come


class Flight:
    """Pieces of work that are under way.

    seconds: that all may take together once they are waited for; async functions that block their loop pass it.
    """

    def __init__(self, workers: Workers, seconds: float | None = None):
        self.workers, self.seconds = workers, seconds
        self.futures: dict[Place, Future] = {}

    def begin(self, place: Place, work: Callable[[], Any]) -> None:
        self.futures[place] = self.workers.begin(work)

    def fail(self, place: Place, error: Exception) -> None:
        """It cannot even begin."""
        self.futures[place] = Future()
        self.futures[place].set_exception(error)

    def results(self, seen: Callable[[Place, Any], None] = lambda place, result: None) -> list:
        """In the order of the places, in which `seen` is told each of them as soon as it has come. The first error, of
        work or of `seen`, is raised at once; `stop` then ends the rest."""
        places = sorted(self.futures)
        futures = [self.futures[place] for place in places]
        found: list = []
        coming = as_completed(futures, timeout=self.seconds)
        while len(found) < len(futures):
            try:
                ended = next(coming)
            except TimeoutError:
                raise self._stuck() from None
            if ended.exception() is not None:  # of several, that of the first in order
                next(f for f in futures if f.done() and f.exception() is not None).result()
            while len(found) < len(futures) and futures[len(found)].done():
                found.append(futures[len(found)].result())
                seen(places[len(found) - 1], found[-1])
        return found

    def _stuck(self) -> RewardError:
        _loop.cache_clear()  # and so is the thread of the loop
        return RewardError(
            f"{len(self.futures)} calls of an async reward function took more than {self.seconds:g} s: it blocks the "
            "event loop (by time.sleep or a client that is not async, say). Await what takes time, or write a plain "
            "function"
        )

    def stop(self, *, wait: bool = True) -> None:
        """Nothing goes on that is not done, but for calls in threads, which cannot be ended. wait: for these."""
        for future in self.futures.values():
            future.cancel()
        self.workers.stop(wait=wait)


def run_all(workers: Workers, work: Sequence[Callable[[], Any]], seconds: float | None = None) -> list:
    """The results of all work, in order. The first error ends the rest."""
    flight = Flight(workers, seconds)
    try:
        for number, one in enumerate(work):
            flight.begin((number, 0), one)
        return flight.results()
    finally:
        flight.stop()


@functools.cache
def _loop(process: int) -> asyncio.AbstractEventLoop:
    """The event loop of this process: a fork has no thread that runs its parent's."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rewards", daemon=True).start()
    return loop
