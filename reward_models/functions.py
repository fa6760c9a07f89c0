"""User functions: importing them, calling them with what they name, and awaiting those that are async."""

import asyncio
import functools
import inspect
import os
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from align.errors import ConfigError, RewardError
from align.lazy import imported

CONCURRENCY = 16  # calls of an async function in flight, unless the spec says otherwise


class UserFunction:
    """A function that is called by keyword with those of the available values that it names (all with `**kwargs`).

    Args:
        function: the function, or where it is: "package.module:name" or "path/file.py:name".
        arguments: further keyword arguments, the same in every call.
    """

    def __init__(self, function: str | Callable, arguments: dict[str, Any] | None = None):
        self.source = function if isinstance(function, str) else f"{function.__module__}:{_name_of(function)}"
        self.call = import_function(function) if isinstance(function, str) else function
        self.is_async = inspect.iscoroutinefunction(self.call)
        self.arguments = dict(arguments or {})
        parameters = inspect.signature(self.call).parameters.values()
        if any(p.kind is p.POSITIONAL_ONLY for p in parameters):
            raise ConfigError(f"reward function {self.source} has positional-only parameters; it is called by name")
        self.takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        named = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        self.accepts = {p.name for p in named}
        self.required = {p.name for p in named if p.default is p.empty}
        unknown = [] if self.takes_all else sorted(self.arguments.keys() - self.accepts)
        if unknown:
            raise ConfigError(
                f"reward function {self.source} takes no {', '.join(unknown)}: its parameters are "
                f"{', '.join(sorted(self.accepts)) or 'none'}"
            )

    @property
    def name(self) -> str:
        return self.source.rpartition(":")[2].rpartition(".")[2]

    def select(self, available: dict[str, Any], reward: str, of_run: dict[str, Any] | None = None) -> dict[str, Any]:
        """The keyword arguments of one call. Raises `RewardError` naming the reward and what is missing.

        of_run: what is no column, such as TRL's `log_metric`; columns of the same name come first."""
        available = {**(of_run or {}), **available, **self.arguments}
        missing = sorted(self.required - available.keys())
        if missing:
            raise RewardError(
                f"reward {reward!r}: {self.source} needs {', '.join(missing)}, and there is only "
                f"{', '.join(sorted(available))}. Add the column to the dataset, or give the parameter a default."
            )
        return available if self.takes_all else {k: v for k, v in available.items() if k in self.accepts}


def _name_of(function: Callable) -> str:
    """Its name, also of a partial, and of an object with `__call__`."""
    if isinstance(function, functools.partial):
        return _name_of(function.func)
    if not inspect.isroutine(function):
        return type(function).__qualname__
    renamed = function.__name__ != function.__qualname__.rpartition(".")[2]  # as TRL's users name what a factory made
    return function.__name__ if renamed else function.__qualname__


def run_concurrently(calls: Sequence[Callable[[], Awaitable]], limit: int, seconds: float) -> list:
    """Await every call, at most `limit` at a time; results in order. The first exception cancels the rest.

    seconds: that all of them may take together; a function that blocks the loop instead of awaiting passes them, which
    is a `RewardError`.

    All calls of a process share one event loop in a thread of its own, so that clients which users keep between calls
    stay on their loop, and so that this works where a loop runs already (notebooks).
    """

    async def together() -> list:
        gate = asyncio.Semaphore(limit)

        async def one(call: Callable[[], Awaitable]):
            async with gate:
                return await call()

        tasks = [asyncio.ensure_future(one(call)) for call in calls]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    future = asyncio.run_coroutine_threadsafe(together(), _loop(os.getpid()))
    try:
        return future.result(timeout=seconds)
    except TimeoutError:
        if future.done():
            raise  # of a call
        _loop.cache_clear()  # the loop is stuck, and so is its thread
        raise RewardError(
            f"{len(calls)} calls of an async reward function took more than {seconds:g} s: it blocks the event loop "
            "(by time.sleep or a client that is not async, say). Await what takes time, or write a plain function"
        ) from None
    finally:
        future.cancel()  # an interrupted run leaves no call behind


@functools.cache
def _loop(process: int) -> asyncio.AbstractEventLoop:
    """The event loop of this process: a fork has no thread that runs its parent's."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rewards", daemon=True).start()
    return loop


def check_concurrency(function: UserFunction, concurrency: int | None) -> int | None:
    """Calls in flight of an async function, threads of a plain one (None: no threads)."""
    if concurrency is not None and concurrency < 1:
        raise ConfigError(f"reward function {function.source}: concurrency must be at least 1, got {concurrency}")
    return (concurrency or CONCURRENCY) if function.is_async else concurrency


def import_function(path: str) -> Callable:
    """The function at "package.module:name" or "file.py:name". Modules are looked for in the current folder too."""
    return imported(path, "reward function")
