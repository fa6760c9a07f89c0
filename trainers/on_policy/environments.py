"""What a policy talks with during a rollout: environments and tools, as users write them, and their options.

Two kinds of environment, told apart by `step`:

    reset(row) -> text or None, step(answer) -> (text, reward, done)     the environment answers what the policy wrote
    reset(**row) -> text or None, get_reward() -> number                 TRL's: every other public method is a tool

A new one is made for every sample of every rollout. `reset` is given the row's columns and `environment_seed`, which is
the same for all samples of a prompt in a rollout; its text is appended to the last user message. `close()`, if there is
one, is called at the end. Text of `step` comes as the next user message, what tools return as tool messages. Of several
environments, each with a name, the row's column `environment` picks one.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset

from align.config.early_checks import check_environment, check_tools
from align.data.formats import columns_of
from align.data.streams import is_stream
from align.errors import ConfigError, one_line
from align.lazy import imported
from align.reward_models.base import Reward, RewardBatch, RewardOutput
from align.reward_models.deadlines import call_within
from align.reward_models.failures import Failed, Failures
from align.trainers.core.hooks import TrainingSettings
from align.trainers.on_policy.tool_calls import readable
from align.trainers.on_policy.tools import Tools, awaited

REWARD_COLUMN, FAILURE_COLUMN = "environment_reward", "environment_failure"  # what other rewards may name
CLASS_COLUMN = "environment_class"
PICKS = "environment"  # the column of a row that names one of several
OWN = ("reset", "step", "get_reward", "close")
ON_ERROR = ("stop", "mask")


@dataclass
class EnvironmentOptions(TrainingSettings):
    environment: dict[str, str] | str | None = field(
        default=None,
        metadata={
            "help": "What the policy talks with, a class or function that makes one: path/file.py:Class, or several by "
            "name, of which a row's column `environment` picks one (docs/environments.md)."
        },
    )
    tools: list[str] | str | None = field(
        default=None, metadata={"help": "Functions that the policy may call: path/file.py:function, one or several."}
    )
    max_turns: int | None = field(
        default=None,
        metadata={"help": "Answers of the policy in a conversation. Default: as many as max_completion_length holds."},
    )
    environment_timeout: float = field(
        default=60.0, metadata={"help": "Seconds that a step of the environment or a call of a tool may take."}
    )
    environment_on_error: str = field(
        default="stop",
        metadata={
            "help": "An environment that raises or does not answer in time: stop, or mask (the completion is in no "
            "loss and no baseline; at most a tenth of them). What goes wrong in a tool is told the policy."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.environment_on_error not in ON_ERROR:
            raise ConfigError(
                f"environment_on_error must be one of {', '.join(ON_ERROR)}, got {self.environment_on_error!r}",
                key="environment_on_error",
            )
        if isinstance(self.tools, str):
            self.tools = [self.tools]
        check_environment(self.environment)
        check_tools(self.tools)


@dataclass
class Reply:
    """What comes back for an answer. messages: the next turn, all of one role; none ends the conversation."""

    messages: list[dict]
    reward: float = 0.0
    done: bool = False


EMPTY = [{"role": "user", "content": ""}]  # what an environment adds to that makes up the prompts
Factory = Callable[[], Any] | Mapping[str, Callable[[], Any]] | None


class EnvironmentFailure(Exception):
    """What a user's environment did wrong, for `environment_on_error`."""


class Kind:
    """Makes the sessions with one kind of environment, or with tools alone.

    Args:
        factory: makes an environment, without arguments; None with tools alone. tools: functions, as TRL takes them.
        timeout: seconds of a call.
    """

    def __init__(self, factory: Callable[[], Any] | None, tools: list[Callable], timeout: float):
        self.factory, self.functions, self.timeout = factory, tools, timeout
        try:
            probe = self.made()
        except Exception as error:  # the user's code raises anything
            name = getattr(factory, "__qualname__", repr(factory))
            raise ConfigError(
                f"environment {name} cannot be made, for which it is called without arguments: {one_line(error)}",
                key="environment",
            ) from error
        self.name = None if probe is None else type(probe).__name__
        self.steps = probe is not None and callable(getattr(probe, "step", None))
        if probe is not None and not callable(getattr(probe, "reset", None)):
            raise ConfigError(f"environment {self.name} has no method reset: it is called before every conversation")
        self.methods = [] if probe is None or self.steps else tool_methods(probe)
        self.scores = self.steps or (probe is not None and callable(getattr(probe, "get_reward", None)))
        own = [getattr(probe, name) for name in self.methods]
        for call in (*own, *(getattr(probe, name, None) for name in OWN)):
            if inspect.iscoroutinefunction(call):
                raise ConfigError(f"{call.__qualname__} is async, and environments are called plainly here")
        self.tools = Tools([*tools, *own], timeout)

    def made(self) -> Any:
        """A new environment; None with tools alone. Raises what its code raises, and `DeadlineExceeded`."""
        return None if self.factory is None else call_within(self.timeout, self.factory)

    def start(self) -> "Session":
        environment = self.made()
        methods = [getattr(environment, name) for name in self.methods]
        return Session(self, environment, self.tools.bound([*self.functions, *methods]))


class Environments:
    """What the conversations of a run are with.

    Args:
        factory: makes an environment, without arguments; several by name, of which a row's column `environment` picks
            one; None with tools alone. tools: functions for all of them. timeout: seconds of a call.
    """

    def __init__(self, factory: Factory, tools: list[Callable], timeout: float):
        tools = [awaited(tool, timeout) if inspect.iscoroutinefunction(tool) else tool for tool in tools]
        self.several = isinstance(factory, Mapping)
        factories = factory if isinstance(factory, Mapping) else {None: factory}
        if not factories:
            raise ConfigError("environment_factory names no environment")
        self.kinds = {name: Kind(make, tools, timeout) for name, make in factories.items()}

    @property
    def roles(self) -> list[str]:
        """Of the messages that the policy gets."""
        kinds = self.kinds.values()
        return ["user"] * any(kind.steps for kind in kinds) + ["tool"] * any(kind.tools.schemas for kind in kinds)

    @property
    def functions(self) -> list[Callable]:
        """Tools and the methods that are, of all environments."""
        return list({id(of): of for kind in self.kinds.values() for of in kind.tools.functions.values()}.values())

    @property
    def own_parts(self) -> dict[str, Any]:
        """What of them may be the user's code, by option."""
        kinds = list(self.kinds.values())
        factories = {str(name): kind.factory for name, kind in self.kinds.items() if kind.factory is not None}
        return {"environment": factories, "tools": kinds[0].functions}

    @property
    def scores(self) -> list[str]:
        """The classes that have a reward of their own, each once."""
        return list(dict.fromkeys(str(kind.name) for kind in self.kinds.values() if kind.scores))

    def kind_of(self, row: dict) -> Kind:
        """What the conversation of this row is with."""
        name = row.get(PICKS) if self.several else None
        if name not in self.kinds:
            raise ConfigError(
                f"row {row.get('row')} has environment={name!r}, which is not among the environments of "
                f"environment_factory: {', '.join(map(str, self.kinds))}"
            )
        return self.kinds[name]

    def check(self, dataset: Any) -> None:
        """Raises `ConfigError` where a row names none of several; the rows of a stream are checked when they come."""
        if not self.several:
            return
        columns = columns_of(dataset, streams=True)
        if PICKS not in columns:
            raise ConfigError(
                f"several environments need a column {PICKS!r} in the data, which names one of "
                f"{', '.join(map(str, self.kinds))}; it has {', '.join(sorted(columns))}"
            )
        if not is_stream(dataset):
            for number, name in enumerate(dataset[PICKS][:]):
                self.kind_of({PICKS: name, "row": number})


def tool_methods(environment: Any) -> list[str]:
    """Names of its public methods but those of the interface, as TRL finds them."""
    members = inspect.getmembers(type(environment), predicate=inspect.isfunction)
    return [name for name, _ in members if not name.startswith("_") and name not in OWN]


class Session:
    """One conversation's environment and tools. Errors of the user's code are raised as `EnvironmentFailure`."""

    def __init__(self, of: Kind, environment: Any, tools: Tools):
        self.of, self.environment, self.tools = of, environment, tools
        self.reward = 0.0

    def reset(self, row: dict) -> str | None:
        """Text to be appended to the prompt."""
        if self.environment is None:
            return None
        reset = self.environment.reset
        text = self._call("reset", (lambda: reset(row)) if self.of.steps else (lambda: reset(**row)))
        if not (text is None or isinstance(text, str)):
            raise EnvironmentFailure(f"reset returned {type(text).__name__} instead of a text or None")
        return text and readable(text)

    def reply(self, answer: str) -> Reply:
        calls = self.tools.calls(answer)
        if calls:
            return Reply([self.tools.answer(call) for call in calls])
        if not self.of.steps:
            return Reply([], done=True)
        found = self._call("step", lambda: self.environment.step(answer))
        if not (isinstance(found, tuple) and len(found) == 3):
            raise EnvironmentFailure(f"step returned {found!r:.100} instead of (text, reward, done)")
        text, reward, done = found
        self.reward += number(reward, "step")
        if not done and not isinstance(text, str):
            raise EnvironmentFailure(f"step is not done, and its text is {text!r:.100}")
        return Reply([] if done else [{"role": "user", "content": readable(text)}], reward, bool(done))

    def finish(self) -> float | None:
        """The reward of the whole conversation; None where the environment has none."""
        if not self.of.scores:
            return None
        if not self.of.steps:
            self.reward = number(self._call("get_reward", self.environment.get_reward), "get_reward")
        return self.reward

    def close(self) -> None:
        if callable(getattr(self.environment, "close", None)):
            self._call("close", self.environment.close)

    def _call(self, name: str, call: Callable[[], Any]) -> Any:
        try:
            return call_within(self.of.timeout, call)
        except (Exception, SystemExit) as error:  # the user's code raises anything, and so does what it asks
            late = f"did not return within environment_timeout ({self.of.timeout:g} s)"
            said = late if type(error).__name__ == "DeadlineExceeded" else f"raised {type(error).__name__}: {error}"
            raise EnvironmentFailure(f"{name} {said}") from error


def number(value: Any, of: str) -> float:
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise EnvironmentFailure(f"the reward of {of} is {value!r:.100}, no finite number")
    return found


class EnvironmentReward(Reward):
    """The own reward of the environments of one class, which comes with each completion; it does not apply to those of
    others. on_error: as `Failures`."""

    def __init__(self, name: str, on_error: str):
        self.name, self.failures = name, Failures(name, on_error)

    def _score(self, batch: RewardBatch) -> RewardOutput:
        columns = (batch.columns[name] for name in (CLASS_COLUMN, REWARD_COLUMN, FAILURE_COLUMN))
        found = [
            None if of != self.name else reward if failure is None else Failed(failure)
            for of, reward, failure in zip(*columns, strict=True)
        ]
        self.failures.count(found, range(len(found)), batch)
        return self.failures.output(found)


def environments_of(args: EnvironmentOptions, tools: Any, factory: Factory) -> Environments | None:
    """What a run's conversations are with; None where there are none. tools, factory: of the trainer's arguments, which
    come before those of the configuration."""
    given = list(tools or [])
    functions = given or [imported(path, "tool") for path in args.tools or []]
    if factory is None and isinstance(args.environment, dict):
        factory = {name: imported(path, "environment") for name, path in args.environment.items()}
    elif factory is None and isinstance(args.environment, str):
        factory = imported(args.environment, "environment")
    if factory is None and not functions:
        if args.max_turns is not None:
            raise ConfigError("max_turns counts turns with an environment or tools: name one", key="max_turns")
        for name in ("environment_timeout", "environment_on_error"):
            if getattr(args, name) != EnvironmentOptions.__dataclass_fields__[name].default:
                raise ConfigError(f"{name}: only with an environment or tools", key=name)
        return None
    return Environments(factory, functions, args.environment_timeout)


def rows_of(dataset: Any, args: Any, factory: Factory) -> Any:
    """The rows to train on: those that were given; for an environment whose `reset` makes up the prompts, as many empty
    ones as a rollout takes, which come again for every rollout. None where there is neither. args: `OnPolicyConfig`."""
    made = factory or (args and args.environment)
    if dataset is not None or not made:
        return dataset
    if isinstance(made, Mapping):
        raise ConfigError(
            f"training with several environments requires a `train_dataset` with a column {PICKS!r}, which picks one"
        )
    if args is None or args.max_steps <= 0:
        raise ConfigError(
            "without a `train_dataset` the environment's reset makes up the prompts, and only max_steps, the number of "
            "optimiser steps, says how long to train: set it"
        )
    return Dataset.from_list([{"prompt": EMPTY}] * args.prompts_per_rollout)


def with_prompts(dataset: Any) -> Any:
    """Rows that say nothing themselves have an empty message, which `reset` adds to."""
    if {"prompt", "prompt_ids", "chosen"} & columns_of(dataset, streams=True):
        return dataset
    return dataset.map(lambda row: {"prompt": EMPTY})
