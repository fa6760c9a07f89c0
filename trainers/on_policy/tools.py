"""Functions that a policy may call."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from transformers.utils import get_json_schema
from transformers.utils.chat_template_utils import DocstringParsingException, TypeHintParsingException

from align.errors import ConfigError
from align.reward_models.beside import OnLoop, run_all
from align.reward_models.deadlines import DeadlineExceeded, call_within
from align.trainers.on_policy.tool_calls import Call, InMarks, Reader, read_json, readable


class Tools:
    """Tools of one conversation, and how often they were called.

    Args:
        functions: with type hints and a docstring in Google's style, from which the schema is made. timeout: seconds
            of a call.

    `read` reads their calls, as the run's chat template writes them.
    """

    def __init__(self, functions: list[Callable], timeout: float):
        self.timeout, self.schemas = timeout, [schema_of(function) for function in functions]
        self.read: Reader = InMarks(read_json)
        self._take(functions)

    def _take(self, functions: list[Callable]) -> None:
        self.functions = {function.__name__: function for function in functions}
        if len(self.functions) < len(functions):
            raise ConfigError(f"two tools have the same name in {[function.__name__ for function in functions]}")
        self.called = self.failed = 0

    def bound(self, functions: list[Callable]) -> "Tools":
        """The same tools for one conversation, some of them methods of its environment."""
        other = object.__new__(Tools)
        other.timeout, other.schemas, other.read = self.timeout, self.schemas, self.read
        other._take(functions)
        return other

    def calls(self, answer: str) -> list[Call]:
        """The calls in an answer, in order; a text is what could not be read as one."""
        schemas = {schema["function"]["name"]: schema["function"]["parameters"] for schema in self.schemas}
        return self.read(answer, schemas) if self.functions else []

    def answer(self, call: Call) -> dict:
        """The tool message that answers a call. What went wrong is told in it, as TRL does."""
        self.called += 1
        if isinstance(call, str):
            return self._failure("unknown", call)
        name = call["name"]
        if name not in self.functions:
            return self._failure(name, f"Tool {name} not found.")
        try:
            result = call_within(self.timeout, lambda: str(self.functions[name](**call["arguments"])))
        except DeadlineExceeded:
            return self._failure(name, f"{name} did not return within {self.timeout:g} s")
        except (Exception, SystemExit) as error:  # a tool raises anything, and the policy chose its arguments
            return self._failure(name, str(error))
        return {"role": "tool", "name": name, "content": readable(result)}

    def _failure(self, name: str, reason: str) -> dict:
        self.failed += 1
        return {"role": "tool", "name": name, "content": str({"error": reason})}


def awaited(function: Callable, timeout: float) -> Callable:
    """An async function as a plain one. Calls of several conversations are awaited one after another. timeout: as
    `call_within` keeps it, which comes first."""

    @functools.wraps(function)
    def call(**arguments: Any) -> Any:
        return run_all(OnLoop(1), [functools.partial(function, **arguments)], seconds=timeout + 10)[0]

    return call


def schema_of(function: Callable) -> dict:
    if not inspect.isroutine(function) and not inspect.isclass(function):
        raise ConfigError(
            "tools are functions with type hints and a docstring, from which their schema is made, and "
            f"{function!r:.80} is none: write a def that calls it, with what is to be given to it as its parameters"
        )
    try:
        return get_json_schema(function)
    except (DocstringParsingException, TypeHintParsingException, NameError) as error:  # NameError: of a hint in quotes
        raise ConfigError(f"tool {function.__qualname__}: {error}") from error
