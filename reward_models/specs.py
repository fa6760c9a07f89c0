"""The kinds of rewards that a configuration may name: their options, and how each is made. A kind is one entry here.

Nothing heavy is imported before a reward is made, so that a configuration is checked at once.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from pydantic import BeforeValidator, Field, model_validator

import align.reward_models.judge_specs  # noqa: F401  (registers its kinds)
from align.config.sections import parse, parse_list, plain
from align.config.server_key import KEY_VARIABLE, VLLM_KEY_VARIABLE, read_key
from align.errors import ConfigError, RewardError
from align.lazy import imported
from align.reward_models.function_specs import RuleSpec
from align.reward_models.kinds import REWARDS as REWARDS
from align.reward_models.kinds import Count, Dtype, PathText, RewardSpec, TorchName
from align.reward_models.kinds import register_reward as register_reward
from align.reward_models.repeats import check_served, warn_of_repeats

if TYPE_CHECKING:
    from align.reward_models.base import Reward


def parse_reward(spec: Any, key: str = "reward") -> "RewardSpec | Reward":
    """The options that `spec` describes, checked; a `Reward` is returned as it is.

    spec: a mapping whose `type` is a registered name or "path/file.py:Class"; a text: the folder or hub name of a
    classifier, or a rule if it contains a colon; a function. key: the dotted path of the spec, for errors. Raises
    `ConfigError`.
    """
    if isinstance(spec, str | Path):
        text = str(spec)
        if not text:
            raise ConfigError(f"{key}: a reward is empty: name a classifier's folder or a function", key=key)
        return RuleSpec(function=text) if ":" in text else ClassifierSpec(path=text)
    if not isinstance(spec, Mapping | RewardSpec):
        from align.reward_models.base import Reward

        if isinstance(spec, Reward):
            return spec
        if callable(spec):
            return RuleSpec(function=spec)
        raise ConfigError(f"{key}: a reward is a mapping or a text, got {type(spec).__name__}: {spec!r:.100}", key=key)
    if isinstance(spec, RewardSpec):
        parsed = spec
    elif ":" in str(spec.get("type")):
        options = {name: value for name, value in spec.items() if name != "type"}
        parsed = parse(_imported(str(spec["type"]), key), options, key)
    else:
        _check_ranks(spec, key)
        parsed = cast(RewardSpec, REWARDS.parse(spec, key))
    parts = {
        name: parse_list(parse_reward, getattr(parsed, name), f"{key}.{name}")
        for name in parsed.nested
        if getattr(parsed, name) is not None
    }
    parsed = parsed.model_copy(update=parts)
    check_served(parsed.parts(), key)
    return parsed


def _check_ranks(spec: Mapping, key: str) -> None:
    """ConfigError for a kind that has no model to place."""
    kind = spec.get("type")
    cls = REWARDS.kinds.get(kind) if isinstance(kind, str) else None
    if "ranks" in spec and cls is not None and "ranks" not in cls.keys():
        nested = isinstance(cls, type) and issubclass(cls, RewardSpec) and cls.nested
        where = f"set it for each of its {' and '.join(nested)}" if nested else "leave it out"
        raise ConfigError(
            f"{key}.ranks says which ranks load a model, and {cls.label} has none of its own: {where}",
            key=f"{key}.ranks",
        )


def _imported(kind: str, key: str) -> type[RewardSpec]:
    """The kind at "package.module:Class" or "path/file.py:Class"."""
    cls = imported(kind, "reward type")
    if not (isinstance(cls, type) and issubclass(cls, RewardSpec)):
        raise ConfigError(f"{key}: type {kind} is no subclass of align.RewardSpec", key=f"{key}.type")
    cls.kind, cls.label = kind, f"a {kind} reward"
    return cls


def parse_rewards(specs: Any, key: str = "rewards") -> "list[RewardSpec | Reward]":
    """The specs of a section, one or a list of them."""
    several = isinstance(specs, list | tuple)
    parsed = parse_list(parse_reward, specs, key) if several else [parse_reward(specs, key)]
    check_served(parsed, key)
    return parsed


def as_written(spec: "RewardSpec | Reward") -> Any:
    """A spec as a plain mapping; the name of a reward that came as an object."""
    return plain(spec) if isinstance(spec, RewardSpec) else spec.name


# ---- kinds ----------------------------------------------------------------------------------------------------------


MaxLength = Annotated[
    Count | None, Field(description="Longer sequences lose the start of their prompt. Default: they are an error.")
]
Normalize = Annotated[
    bool | None,
    Field(description="true needs the normaliser saved beside the model, false ignores it. Default: used if there."),
]


def _are_ranks(value: Any) -> Any:
    shown = f"not {value!r:.60}: ranks count from 0"
    if value is None or isinstance(value, list) and value and all(type(rank) is int and rank >= 0 for rank in value):
        if value is not None and len(set(value)) < len(value):
            raise ValueError(f"ranks are those of the run that load the model, each once, {shown}")
        return value
    example = f"[{value}]" if type(value) is int and value >= 0 else "[0] or [6, 7]"
    raise ValueError(f"ranks are a list of those of the run that load the model, such as {example}, {shown}")


Ranks = Annotated[
    list[int] | None,
    BeforeValidator(_are_ranks),
    Field(description="Of the run, which alone load the model and score for all. Default: every process loads it."),
]


class OfModel(RewardSpec):
    """Options of a reward that reads a model."""

    path: PathText = Field(description="Folder (a LoRA adapter's too) or hub name.")
    name: str | None = Field(None, description="In metrics. Default: the folder's name.")
    max_length: MaxLength = None
    batch_tokens: Count | None = Field(None, description="Padded tokens per forward pass.")
    device: int | TorchName | None = Field(None, description="Default: a GPU if there is one.")
    dtype: Dtype | None = Field(None, description="Default: as saved on a GPU, float32 on a CPU.")
    offload: bool = Field(False, description="On the GPU only while it scores; else in the host's memory.")
    ranks: Ranks = None

    @property
    def model_ranks(self) -> list[int] | None:
        return self.ranks

    @property
    def stated_name(self) -> str:
        return self.name or Path(self.path).name


@register_reward("classifier")
class ClassifierSpec(OfModel):
    """The score of a trained model with one output."""

    normalize: Normalize = None
    batch_size: Count | None = Field(None, description="At most so many sequences per forward pass.")

    def build(self, tokenizer=None, device=None):
        from align.reward_models.classifier import ClassifierReward

        self.check()
        return ClassifierReward(self.path, policy_tokenizer=tokenizer, **{"device": device, **self.options("path")})

    def check(self) -> None:
        from align.reward_models.ensemble import FILE_NAME

        if (Path(self.path) / FILE_NAME).exists():
            raise ConfigError(
                f"{self.path} holds an ensemble: write {{type: ensemble, path: {self.path}, aggregation: uwo, lambda: "
                "0.5}, or name one of its members"
            )

    def models(self) -> dict[str, bool]:
        return {self.path: True}


@register_reward("implicit")
class ImplicitSpec(OfModel):
    """What a policy was trained to prefer: beta times the log-ratio to its reference."""

    reference: PathText | None = Field(None, description="The model it was trained from. A LoRA adapter needs none.")
    beta: float = Field(0.1, gt=0, description="Scales the score.")

    def build(self, tokenizer=None, device=None):
        from align.reward_models.implicit import ImplicitReward

        return ImplicitReward(self.path, policy_tokenizer=tokenizer, **{"device": device, **self.options("path")})

    def models(self) -> dict[str, bool]:
        return {path: False for path in (self.path, self.reference) if path is not None}


class OfServer(RewardSpec):
    """Options of a reward that a server computes."""

    headers: dict[str, str | int | float] = Field({}, description="Of every request, with ${NAME} as in url.")
    batch_size: int = Field(64, ge=1, description="Completions per request.")
    concurrency: int = Field(4, ge=1, description="Requests in flight at most.")
    timeout: float = Field(60.0, gt=0, description="Seconds for a connection, and then for the answer.")
    retries: int = Field(5, ge=0, description="Further attempts.")
    backoff: float = Field(0.5, ge=0, description="Seconds, doubled with every attempt.")

    def with_key(self, variable: str, file: str | None) -> dict[str, Any]:
        """What was set, the key of the server among the headers. file: its file, None where it needs none."""
        options = self.options("api_key_file")
        if file is not None:
            key = read_key(variable, file, f"the server of reward {self.stated_name!r}")
            options["headers"] = {**self.headers, "Authorization": f"Bearer {key}"}
        return options

    def check(self) -> None:
        self.build()


@register_reward("remote")
class RemoteSpec(OfServer):
    """The score of a server."""

    url: str = Field(description="Where to post. ${NAME} stands for an environment variable.")
    name: str = Field("remote", description="In metrics.")
    columns: list[str] = Field([], description="Columns of the dataset to send along.")
    api_key_file: PathText | None = Field(
        None, description=f"File with the key of `align serve --reward`, unless ${KEY_VARIABLE} has it."
    )

    def build(self, tokenizer=None, device=None):
        from align.reward_models.remote import RemoteReward

        return RemoteReward(**self.with_key(KEY_VARIABLE, self.api_key_file))


@register_reward("vllm")
class VllmSpec(OfServer):
    """The score of a classifier on a vLLM server."""

    url: str = Field(description="Of the server, http://localhost:8000. ${NAME} stands for an environment variable.")
    path: PathText = Field(description="Folder or hub name of the served model, for its tokenizer and normaliser.")
    model: str | None = Field(None, description="The name that the server knows it by. Default: the only one there.")
    name: str | None = Field(None, description="In metrics. Default: the folder's name.")
    normalize: Normalize = None
    max_length: MaxLength = None
    api_key_file: PathText | None = Field(
        None, description=f"File with the key of the server (--api-key), unless ${VLLM_KEY_VARIABLE} has it."
    )

    @property
    def stated_name(self) -> str:
        return self.name or Path(self.path).name

    def build(self, tokenizer=None, device=None):
        from align.reward_models.vllm_server import VllmReward

        return VllmReward(policy_tokenizer=tokenizer, **self.with_key(VLLM_KEY_VARIABLE, self.api_key_file))


@register_reward("composite")
class CompositeSpec(RewardSpec):
    """The weighted sum of named rewards."""

    nested = ("rewards",)
    rewards: list[Any] = Field(min_length=1, description="Specs, each with a name of its own.")
    weights: dict[str, float] | None = Field(None, description="By name. Default: 1 for all.")
    name: str = Field("composite", description="In metrics.")

    def build(self, tokenizer=None, device=None):
        from align.reward_models.build import build_reward
        from align.reward_models.composite import CompositeReward

        built = [build_reward(spec, tokenizer=tokenizer, device=device) for spec in self.rewards]
        return CompositeReward(built, **self.options("rewards"))


OF_PATH = (
    "max_length",
    "batch_tokens",
    "offload",
    "ranks",
)  # options of an ensemble's models, not of members given one by one


@register_reward("ensemble")
class EnsembleSpec(RewardSpec):
    """Several rewards for the same thing, combined against over-optimisation."""

    nested = ("members",)
    aggregation: str | Callable = Field(description="mean, wco, uwo, lcb, quantile, or path/file.py:function of yours.")
    members: list[Any] | None = Field(None, min_length=1, description="Specs of any kind.")
    path: PathText | None = Field(None, description="A folder that `align reward` made with `ensemble`.")
    lambda_: float | None = Field(None, alias="lambda", description="Of uwo and lcb.")
    quantile: float | None = Field(None, description="Of quantile.")
    ddof: int | None = Field(None, ge=0, le=1, description="0: population variance [0], 1: unbiased.")
    name: str | None = Field(None, description="In metrics.")
    normalize: bool = Field(True, description="false: combine raw scores, for members on one scale.")
    max_length: Count | None = Field(None, description="Of the models of path.")
    batch_tokens: Count | None = Field(None, description="Of the models of path.")
    offload: bool = Field(False, description="Of the models of path: on the GPU only while they score.")
    ranks: Ranks = None

    @property
    def model_ranks(self) -> list[int] | None:
        return self.ranks

    @model_validator(mode="after")
    def _one_source(self):
        if (self.members is None) == (self.path is None):
            raise ValueError("give either members (a list of rewards) or path (a saved ensemble)")
        of_path = [name for name in OF_PATH if getattr(self, name)]
        if of_path and self.path is None:
            raise ValueError(f"{', '.join(of_path)} of an ensemble belong to path: set them for each of the members")
        return self

    def build(self, tokenizer=None, device=None):
        from align.reward_models.build import build_reward
        from align.reward_models.ensemble import RewardEnsemble, load_ensemble

        rule: dict[str, Any] = {"aggregation": self.aggregation, "lambda_": self.lambda_, "normalize": self.normalize}
        rule |= {name: value for name, value in self.options().items() if name in ("ddof", "quantile")}
        try:
            if self.path is not None:
                models = {name: value for name, value in self.options().items() if name in OF_PATH}
                models |= {"policy_tokenizer": tokenizer, "device": device}
                return load_ensemble(self.path, **rule, **models, name=self.name)
            members = list(self.members or ())
            warn_of_repeats(members)
            if not self.normalize:
                members = [_raw(member) for member in members]
            built = [build_reward(member, tokenizer=tokenizer, device=device) for member in members]
            return RewardEnsemble(built, **rule, name=self.name or "ensemble")
        except RewardError as error:
            raise ConfigError(str(error)) from error

    def check(self) -> None:
        from align.objectives.ensemble import check_rule
        from align.reward_models.ensemble import ensemble_members, found_rule

        count = len(self.members or () if self.path is None else ensemble_members(self.path))
        check_rule(found_rule(self.aggregation), count, self.lambda_, self.ddof or 0, self.quantile)
        super().check()

    def models(self) -> dict[str, bool]:
        from align.reward_models.ensemble import models_held

        return super().models() if self.path is None else {str(path): True for path in models_held(self.path)}


def _raw(member: "RewardSpec | Reward") -> "RewardSpec | Reward":
    """A member whose classifiers leave their normaliser out, unless one says otherwise itself."""
    if isinstance(member, ClassifierSpec | VllmSpec | EnsembleSpec) and "normalize" not in member.model_fields_set:
        return member.model_copy(update={"normalize": False})
    if isinstance(member, CompositeSpec):
        return member.model_copy(update={"rewards": [_raw(reward) for reward in member.rewards]})
    return member
