"""What a policy talks with during a rollout: environments and tools, as users write them, and their options.

Two kinds of environment, told apart by `step`:

    reset(row) -> text or None, step(answer) -> (text, reward, done)     the environment answers what the policy wrote
    reset(**row) -> text or None, get_reward() -> number                 TRL's: every other public method is a tool

A new one is made for every sample of every rollout. `reset` is given the row's columns and `environment_seed`, which is
the same for all samples of a prompt in a rollout; its text is appended to the last user message. `close()`, if there is
one, is called at the end. Text of `step` comes as the next user message, what tools return as tool messages.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from align.errors import ConfigError
from align.lazy import imported
from align.reward_models.base import Reward, RewardBatch, RewardOutput
from align.reward_models.deadlines import call_within
from align.reward_models.failures import Failed, Failures
from align.trainers.core.hooks import TrainingSettings
from align.trainers.on_policy.tools import Tools, awaited

REWARD_COLUMN, FAILURE_COLUMN = "environment_reward", "environment_failure"  # what other rewards may name
OWN = ("reset", "step", "get_reward", "close")
ON_ERROR = ("stop", "mask")


@dataclass
class EnvironmentOptions(TrainingSettings):
    environment: str | None = field(
        default=None,
        metadata={
            "help": "What the policy talks with, a class or function that makes one: path/file.py:Class "
            "(docs/environments.md)."
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


@dataclass
class Reply:
    """What comes back for an answer. messages: the next turn, all of one role; none ends the conversation."""

    messages: list[dict]
    reward: float = 0.0
    done: bool = False


class EnvironmentFailure(Exception):
    """What a user's environment did wrong, for `environment_on_error`."""


class Environments:
    """Makes the sessions of a run.

    Args:
        factory: makes an environment, without arguments; None with tools alone. tools: functions, as TRL takes them.
        timeout: seconds of a call.
    """

    def __init__(self, factory: Callable[[], Any] | None, tools: list[Callable], timeout: float):
        tools = [awaited(tool, timeout) if inspect.iscoroutinefunction(tool) else tool for tool in tools]
        self.factory, self.functions, self.timeout = factory, tools, timeout
        probe = None if factory is None else factory()
        self.name = None if probe is None else type(probe).__name__
        self.steps = probe is not None and callable(getattr(probe, "step", None))
        if probe is not None and not callable(getattr(probe, "reset", None)):
            raise ConfigError(f"environment {self.name} has no method reset: it is called before every conversation")
        self.methods = [] if probe is None or self.steps else tool_methods(probe)
        self.scores = self.steps or (probe is not None and callable(getattr(probe, "get_reward", None)))
        own = [getattr(probe, name) for name in self.methods]
        if not (self.steps or tools or own):
            raise ConfigError(
                f"environment {self.name} has neither step(answer) nor public methods that are tools: the policy could "
                "not talk with it"
            )
        for call in (*tools, *own, *(getattr(probe, name, None) for name in OWN)):
            if inspect.iscoroutinefunction(call):
                raise ConfigError(f"{call.__qualname__} is async, and environments are called plainly here")
        self.tools = Tools([*tools, *own], timeout)

    @property
    def roles(self) -> list[str]:
        """Of the messages that the policy gets."""
        return ["user"] * self.steps + ["tool"] * bool(self.tools.schemas)

    def start(self) -> "Session":
        environment = None if self.factory is None else self.factory()
        methods = [getattr(environment, name) for name in self.methods]
        return Session(self, environment, self.tools.bound([*self.functions, *methods]))


def tool_methods(environment: Any) -> list[str]:
    """Names of its public methods but those of the interface, as TRL finds them."""
    members = inspect.getmembers(type(environment), predicate=inspect.isfunction)
    return [name for name, _ in members if not name.startswith("_") and name not in OWN]


class Session:
    """One conversation's environment and tools. Errors of the user's code are raised as `EnvironmentFailure`."""

    def __init__(self, of: Environments, environment: Any, tools: Tools):
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
        return text

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
        return Reply([] if done else [{"role": "user", "content": text}], reward, bool(done))

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
        except Exception as error:  # the user's code raises anything, and so does what it asks
            late = f"did not return within environment_timeout ({self.of.timeout:g} s)"
            said = late if type(error).__name__ == "DeadlineExceeded" else f"raised {type(error).__name__}: {error}"
            raise EnvironmentFailure(f"{name} {said}") from error


def number(value: Any, of: str) -> float:
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise EnvironmentFailure(f"the reward of {of} is {value!r:.100}, no finite number")
    return found


class EnvironmentReward(Reward):
    """The environment's own reward, which comes with each completion. on_error: as `Failures`."""

    def __init__(self, name: str, on_error: str):
        self.name, self.failures = name, Failures(name, on_error)

    def _score(self, batch: RewardBatch) -> RewardOutput:
        rewards, failures = batch.columns[REWARD_COLUMN], batch.columns[FAILURE_COLUMN]
        found = [r if failure is None else Failed(failure) for r, failure in zip(rewards, failures, strict=True)]
        self.failures.count(found, range(len(found)), batch)
        return self.failures.output(found)


def environments_of(args: EnvironmentOptions, tools: Any, factory: Any) -> Environments | None:
    """What a run's conversations are with; None where there are none. tools, factory: of the trainer's arguments, which
    come before those of the configuration."""
    if isinstance(factory, dict):
        raise ConfigError(
            "environment_factory is one callable here: for several environments, let it make one whose reset reads the "
            "row and chooses"
        )
    given = list(tools or [])
    functions = given or [imported(path, "tool") for path in args.tools or []]
    if factory is None and args.environment is not None:
        factory = imported(args.environment, "environment")
    if factory is None and not functions:
        if args.max_turns is not None:
            raise ConfigError("max_turns counts turns with an environment or tools: name one", key="max_turns")
        return None
    return Environments(factory, functions, args.environment_timeout)
