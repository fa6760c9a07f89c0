"""The kinds of rewards that compare the completions of a prompt with each other."""

import inspect
from collections.abc import Callable
from typing import Any

from pydantic import Field, model_validator

from align.errors import ConfigError
from align.lazy import imported
from align.reward_models.kinds import Count, RewardSpec, register_reward


def judge_function(function: str | Callable) -> Callable:
    """The user's judge, or the one at "file.py:name". ConfigError for one that cannot be called with three lists."""
    found = imported(function, "judge") if isinstance(function, str) else function
    try:
        signature = inspect.signature(found)
    except ValueError:  # of a function in C that does not say
        return found
    try:
        signature.bind([], [], [])
    except TypeError as error:
        name = function if isinstance(function, str) else getattr(function, "__name__", type(function).__name__)
        raise ConfigError(
            f"judge {name}{signature}: {error}. It is called with three lists, (prompts, first, second): one entry per "
            "pair, the prompt and the two answers"
        ) from error
    return found


class Judging(RewardSpec):
    """Options of every judge."""

    swap: bool = Field(True, description="Ask about each pair in both orders, and take the mean.")
    tie_margin: float = Field(0.0, ge=0, lt=0.5, description="Preferences at most so far from 1/2 are ties.")
    max_error_share: float | None = Field(
        None, gt=0, le=1, description="Of the last 1,000 pairs without a verdict; more end the run [0.1]."
    )

    def judging(self) -> dict[str, Any]:
        return {"swap": self.swap, "tie_margin": self.tie_margin, "max_error_share": self.max_error_share}


@register_reward("judge")
class JudgeSpec(Judging):
    """How often a completion is preferred to its prompt's others, by a function or a chat server."""

    function: str | Callable | None = Field(
        None, description="package.module:name or path/file.py:name, of (prompts, first, second)."
    )
    url: str | None = Field(None, description="Of an OpenAI-compatible endpoint, http://.../v1/chat/completions.")
    model: str | None = Field(None, description="The name that the server knows its model by.")
    name: str | None = Field(None, description="In metrics. Default: the function's name, or judge.")
    template: str | None = Field(None, description="File with {prompt}, {first} and {second}. Default: ours.")
    max_tokens: Count = Field(512, description="Of the server's words.")
    request: dict[str, Any] = Field({}, description="Further keys of every request.")
    headers: dict[str, str | int | float] = Field({}, description="Of every request; ${NAME} as in url.")
    concurrency: Count = Field(16, description="Requests in flight at most.")
    timeout: float = Field(120.0, gt=0, description="Seconds for a connection, and then for the answer.")
    retries: int = Field(5, ge=0, description="Further attempts.")
    backoff: float = Field(0.5, ge=0, description="Seconds, doubled with every attempt.")

    @model_validator(mode="after")
    def _one_judge(self):
        if (self.function is None) == (self.url is None):
            raise ValueError("a judge is either a function or a server (url and model): give one of them")
        if (self.url is None) != (self.model is None):
            raise ValueError("url and model belong together: the address of a server, and its model's name there")
        of_server = sorted(self.model_fields_set & SERVER_KEYS)
        if self.url is None and of_server:
            raise ValueError(f"{', '.join(of_server)} are options of a server, and this judge is a function")
        return self

    @property
    def stated_name(self) -> str:
        if self.name or self.function is None:
            return self.name or "judge"
        source = self.function if isinstance(self.function, str) else self.function.__name__
        return source.rpartition(":")[2].rpartition(".")[2]

    def judge(self):
        """The function of (prompts, first, second)."""
        if self.function is not None:
            return judge_function(self.function)
        from align.reward_models.judge_server import ServerJudge

        options = self.options("function", "swap", "tie_margin", "max_error_share")
        return ServerJudge(**{**options, "name": self.stated_name})

    def build(self, tokenizer=None, device=None):
        from align.reward_models.judges import JudgeReward

        return JudgeReward(self.judge(), name=self.stated_name, **self.judging())

    def check(self) -> None:
        self.build()


@register_reward("self_judge")
class SelfJudgeSpec(Judging):
    """The same, by the policy itself: it is asked through the engine that completes the prompts."""

    name: str = Field("self_judge", description="In metrics.")
    template: str | None = Field(None, description="File with {prompt}, {first} and {second}. Default: ours.")
    max_tokens: Count = Field(64, description="Of its words, the verdict at their end.")

    def build(self, tokenizer=None, device=None):
        from align.reward_models.judges import JudgeReward
        from align.reward_models.self_judge import SelfJudge

        judge = SelfJudge(self.name, template=self.template, max_tokens=self.max_tokens)
        return JudgeReward(judge, name=self.name, **self.judging())

    def check(self) -> None:
        self.build()


SERVER_KEYS = {"template", "max_tokens", "request", "headers", "concurrency", "timeout", "retries", "backoff"}
