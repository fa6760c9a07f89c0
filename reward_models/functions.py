"""User functions: importing them, and calling them with what they name."""

import functools
import inspect
from collections.abc import Callable
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
        of_object = getattr(self.call, "__call__", None)  # noqa: B004  (the method, not whether there is one)
        self.is_async = inspect.iscoroutinefunction(self.call) or inspect.iscoroutinefunction(of_object)
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

    @property
    def ours(self) -> bool:
        """Whether it is one of this library's, which draw no random numbers."""
        return str(getattr(self.call, "__module__", None)).startswith("align.")  # of what `exec` made it is None

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


def check_concurrency(function: UserFunction, concurrency: int | None) -> int | None:
    """Calls in flight of an async function, threads of a plain one (None: no threads)."""
    if concurrency is not None and concurrency < 1:
        raise ConfigError(f"reward function {function.source}: concurrency must be at least 1, got {concurrency}")
    return (concurrency or CONCURRENCY) if function.is_async else concurrency


def import_function(path: str) -> Callable:
    """The function at "package.module:name" or "file.py:name". Modules are looked for in the current folder too."""
    return imported(path, "reward function")
