"""Work beside this thread: in threads, or on the event loop of async functions, some at a time, results in order."""

import asyncio
import functools
import os
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future, as_completed
from contextlib import contextmanager
from typing import Any, Protocol

from align.errors import RewardError


class Workers(ABC):
    """Takes work, and does at most so much of it at a time. It begins in the order in which it is given."""

    @abstractmethod
    def begin(self, work: Callable[[], Any]) -> Future: ...

    @abstractmethod
    def stop(self, *, wait: bool) -> None:
        """After this nothing is given; all futures that have not begun were cancelled. wait: for those that have."""


class Threads(Workers):
    """Not those of a `ThreadPoolExecutor`, for which an interrupted process waits before it ends: a call that hangs
    would keep it."""

    def __init__(self, limit: int):
        self.limit = limit
        self.threads: list[threading.Thread] = []
        self.queue: queue.SimpleQueue = queue.SimpleQueue()

    def begin(self, work: Callable[[], Any]) -> Future:
        future: Future = Future()
        self.queue.put((future, work))
        if len(self.threads) < self.limit:
            self.threads.append(threading.Thread(target=self._work, name="rewards", daemon=True))
            self.threads[-1].start()
        return future

    def stop(self, *, wait: bool) -> None:
        for _ in self.threads:
            self.queue.put(None)
        for thread in self.threads if wait else ():
            thread.join()

    def _work(self) -> None:
        while (given := self.queue.get()) is not None:
            future, work = given
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except BaseException as error:  # raised where the result is waited for
                    future.set_exception(error)
                    return  # it ends the rest, of which the next one may take as long to fail
            del given, future, work  # while it waits for more, it keeps nothing


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
        self.stopped = False
        self.lock = threading.Lock()  # an interrupt stops it in another thread than the one that begins work

    def begin(self, place: Place, work: Callable[[], Any]) -> None:
        with self.lock:
            if not self.stopped:
                self.futures[place] = self.workers.begin(work)

    def fail(self, place: Place, error: Exception) -> None:
        """It cannot even begin."""
        future: Future = Future()
        future.set_exception(error)
        with self.lock:
            if not self.stopped:
                self.futures[place] = future

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
        with self.lock:
            self.stopped = True
        for future in self.futures.values():
            future.cancel()
        self.workers.stop(wait=wait)


def run_all(workers: Workers, work: Sequence[Callable[[], Any]], seconds: float | None = None) -> list:
    """The results of all work, in order. The first error ends the rest."""
    flight = Flight(workers, seconds)
    with stopping(flight):
        for number, one in enumerate(work):
            flight.begin((number, 0), one)
        return flight.results()


class Stoppable(Protocol):
    def stop(self, *, wait: bool = True) -> None: ...


@contextmanager
def stopping(under_way: Stoppable) -> Iterator[None]:
    """Nothing of it goes on after the block; but an interrupt does not wait for calls in threads."""
    try:
        yield
    except Exception:
        under_way.stop()
        raise
    except BaseException:
        under_way.stop(wait=False)
        raise
    under_way.stop()


@functools.cache
def _loop(process: int) -> asyncio.AbstractEventLoop:
    """The event loop of this process: a fork has no thread that runs its parent's."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rewards", daemon=True).start()
    return loop
