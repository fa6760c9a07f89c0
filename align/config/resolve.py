"""Entries of a file and a command line -> the typed configuration of one run."""

import dataclasses
import re
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from align.config.names import moved, nearest
from align.config.nested import nested_options
from align.config.options import options_of
from align.config.ranges import problem_with
from align.config.secrets import MASK, masked, masked_text
from align.config.sections import Section
from align.config.source import COMMAND_LINE, Entry, apply_overrides, one_line, read_file, read_overrides
from align.errors import AlignError, ConfigError
from align.lazy import load
from align.methods import Method, get_method

# What constructors of transformers and trl raise for options that they do not take.
REFUSALS = (AlignError, ValueError, TypeError, KeyError, AttributeError, ImportError, OSError, RuntimeError)
REWARD_SECTIONS = ("rewards", "gold_reward")


@dataclass
class DataArguments:
    """Which rows are trained and evaluated on."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Local .parquet, .jsonl, .json or .csv file or folder, or a hub dataset."}
    )
    datasets: list[dict[str, Any]] | None = field(
        default=None,
        metadata={
            "help": "Several datasets to train on together, instead of dataset_name, which evaluations still read: a "
            "list of {path, name, split, weight, columns} (docs/data.md)."
        },
    )
    mixture_seed: int = field(default=0, metadata={"help": "Draws the rows of datasets with a weight, and the order."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(
        default="test", metadata={"help": "Split to evaluate on, read only when eval_strategy is not 'no'."}
    )
    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "Other file, folder or hub dataset to evaluate on. Default: dataset_name."}
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Read the training rows as they are needed; with max_steps, for SFT, preferences, rewards."},
    )

    def __post_init__(self):
        if self.datasets is not None and self.streaming:
            raise ConfigError("streaming: the rows of several datasets are drawn among all of them: leave it out")
        if self.mixture_seed and self.datasets is None:
            raise ConfigError("mixture_seed needs datasets: there is nothing to draw")


@dataclass
class EnsembleArguments:
    """How many models are trained, how they are held, and with which share of wrong labels."""

    ensemble: int = field(
        default=1, metadata={"help": "Train so many members that differ in seed, in output_dir/member_<i>."}
    )
    ensemble_kind: str = field(
        default="separate",
        metadata={
            "help": "How members are held: models of their own, LoRA adapters on one frozen model (with use_peft), or "
            "upper layers on a shared trunk. The last two are trained from one pass over the data.",
            "choices": ["separate", "lora", "shared_trunk"],
        },
    )
    ensemble_member: int | None = field(
        default=None,
        metadata={"help": "Train this separate member alone (0 is the first), so that each can be a job of its own."},
    )
    ensemble_upper_layers: int | None = field(
        default=None, metadata={"help": "Of a shared trunk: layers that each member has of its own."}
    )
    ensemble_train_trunk: bool = field(
        default=False, metadata={"help": "Train the shared layers too. Default: they are frozen."}
    )
    label_noise: float = field(
        default=0.0,
        metadata={
            "help": "Share of the training pairs whose labels are flipped, to study wrong labels; output_dir/"
            "flipped_labels.json says which."
        },
    )
    label_noise_seed: int = field(
        default=0, metadata={"help": "Draws the flipped pairs; the seed of the run and its members do not."}
    )

    def __post_init__(self):
        if self.ensemble < 1:
            raise ConfigError(f"ensemble counts from 1, got {self.ensemble}")
        trunk = self.ensemble_kind == "shared_trunk"
        if trunk and not self.ensemble_upper_layers:
            raise ConfigError("ensemble_kind shared_trunk needs ensemble_upper_layers: each member's own layers")
        if not trunk and (self.ensemble_upper_layers is not None or self.ensemble_train_trunk):
            raise ConfigError("ensemble_upper_layers and ensemble_train_trunk belong to ensemble_kind shared_trunk")
        if self.ensemble == 1 and self.ensemble_kind != "separate":
            raise ConfigError(f"ensemble_kind {self.ensemble_kind} needs an ensemble of 2 or more, not 1")
        if self.ensemble_member is not None and (self.ensemble_kind != "separate" or self.ensemble == 1):
            raise ConfigError("ensemble_member needs an ensemble of 2 or more of ensemble_kind separate")
        if not 0 <= self.label_noise < 1:
            raise ConfigError(f"label_noise is a share in [0, 1), got {self.label_noise}")
        if self.label_noise_seed and not self.label_noise:
            raise ConfigError("label_noise_seed needs label_noise: there is nothing to draw")

    @property
    def several(self) -> bool:
        return self.ensemble > 1


@dataclass
class RunConfig:
    """Everything that one `align <method>` run is made of.

    training: the method's config (a transformers.TrainingArguments). model: trl.ModelConfig. rewards, gold_reward: the
    nested sections as written (None where absent). entries: what was set, and where. given: the same keys with their
    typed values. ensemble: for methods that can train several models on the same pairs.
    """

    method: Method
    training: Any
    model: Any
    data: DataArguments
    rewards: Any
    gold_reward: Any
    entries: dict[str, Entry]
    given: dict[str, Any]
    ensemble: EnsembleArguments | None = None

    def where(self, key: str) -> str:
        """The place a key (`seed`, or `rewards.0.path`) was set, for messages; `default` when it was not."""
        head = key.partition(".")[0]
        if head not in self.entries:
            return "default"
        return self.entries[head].place(key)


def resolve(method_name: str, config_file: str | None, tokens: list[str], *, elsewhere: bool = False) -> RunConfig:
    """Command line over file over default. Raises ConfigError, one line, on anything that does not describe a run.
    elsewhere: the run is looked at here and may train on other machines, so that `bf16` needs no GPU of this one."""
    method = get_method(method_name)
    entries, sections = read_entries(method, config_file, tokens)
    classes = option_classes(method)
    import torch

    arguments: dict[str, dict[str, Any]] = {part: {} for part in classes}
    given = {}
    for key, entry in entries.items():
        given[key] = entry.value
        for part, cls in classes.items():
            if key in _fields(cls):
                arguments[part][key] = value = _typed(key, entry, cls)
                as_written = dataclasses.is_dataclass(value) or type(entry.value) is int and entry.value == value
                given[key] = entry.value if as_written else _plain(value)
    if elsewhere and not torch.accelerator.is_available():
        arguments["training"].setdefault("use_cpu", True)  # transformers refuses bf16 without it
    nested: dict[str, Any] = {key: sections.get(key) for key in REWARD_SECTIONS}
    built = {part: _build(cls, arguments[part], entries, config_file) for part, cls in classes.items()}
    run = RunConfig(method=method, **built, **nested, entries=entries, given=given)
    _check_required(run, config_file)
    return run


def read_entries(method: Method, config_file: str | None, tokens: list[str]) -> tuple[dict[str, Entry], dict[str, Any]]:
    """(what was set and where, the nested sections), before anything that imports torch: a mistake in a key or in a
    section is told at once, and on a machine that the run could not run on."""
    entries = read_file(config_file) if config_file else {}
    apply_overrides(entries, read_overrides(tokens))
    stated = entries.pop("method", None)
    if stated is not None and stated.value != method.name:
        wanted = one_line(str(stated.value))
        raise ConfigError(f"{stated.where}: a file for `align {wanted}`, the command is `align {method.name}`")

    _check_keys(entries, list(options_of(method.name)), method)
    for key, entry in entries.items():
        if MASK in str(entry.value):
            raise ConfigError(f"{entry.where}: {key} was masked when this was written: give it again, as ${{NAME}}")
    return entries, _read_nested(entries, config_file)


def _read_nested(entries: dict[str, Entry], config_file: str | None) -> dict[str, Any]:
    """The nested sections that are set, typed."""
    known = nested_options()
    read = {}
    for key, entry in entries.items():
        if key in known and entry.value is not None:
            try:
                read[key] = known[key].read(entry.value, key)
            except ConfigError as error:
                raise _placed(error, entries, config_file) from error
    return read


def reward_sections(method: Method) -> tuple[str, ...]:
    """The keys of the file that hold reward specs."""
    return () if not method.rewards else REWARD_SECTIONS if method.gold else REWARD_SECTIONS[:1]


def option_classes(method: Method) -> dict[str, type]:
    """The dataclasses whose fields are the options of a method."""
    from trl import ModelConfig

    classes: dict[str, type] = {"training": load(method.config), "model": ModelConfig, "data": DataArguments}
    return {**classes, "ensemble": EnsembleArguments} if method.ensemble else classes


def own_fields(cls: type) -> list[str]:
    """The fields that a method's config declares itself, or whose default it changes."""
    from transformers import TrainingArguments

    added = [c for c in cls.__mro__ if dataclasses.is_dataclass(c) and c not in TrainingArguments.__mro__]
    return [name for name in _fields(cls) if any(name in c.__dict__.get("__annotations__", {}) for c in added)]


@cache
def _fields(cls: type) -> dict[str, dataclasses.Field]:
    return {f.name: f for f in dataclasses.fields(cls) if f.init}


@cache
def hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _check_keys(entries: dict[str, Entry], valid: list[str], method: Method) -> None:
    problems = []
    for key, entry in entries.items():
        if key not in valid:
            dashes = "--" if entry.where == COMMAND_LINE else ""
            now, near = moved(key, valid), nearest(key, valid)
            hint = f"nearest valid: {dashes}{near}" if near else f"see `align {method.name} --help`"
            hint = f"it is {dashes}{now} here" if now else hint
            problems.append(one_line(f"{entry.where}: unknown key {dashes}{key}; {hint}"))
    if problems:
        raise ConfigError("; ".join(problems))


def _placed(
    error: Exception, entries: dict[str, Entry], config_file: str | None, key: str | None = None
) -> ConfigError:
    """The error in one line, with the place of the option that it is about: `error.key`, or `key`."""
    key = getattr(error, "key", None) or key or ""
    head = key.partition(".")[0]
    place = entries[head].place(key) if head in entries else config_file or COMMAND_LINE
    kind = "" if isinstance(error, ValueError | AlignError) else f"{type(error).__name__}: "
    return ConfigError(one_line(masked_text(f"{place}: {kind}{error}")), key=key or None)


@cache
def _adapter(cls: type, key: str):
    """What validates the values of a field."""
    from pydantic import ConfigDict, TypeAdapter

    hint = hints(cls)[key]
    # an options class of a library is validated by its own constructor
    options = None if dataclasses.is_dataclass(hint) else ConfigDict(arbitrary_types_allowed=True)
    return TypeAdapter(hint, config=options)


def _typed(key: str, entry: Entry, cls: type) -> Any:
    """The entry's value as the field's type, or ConfigError naming the place."""
    from pydantic import ValidationError

    hint = hints(cls)[key]
    choices = list(_fields(cls)[key].metadata.get("choices") or [])
    enums = [arm for arm in get_args(hint) if isinstance(arm, type) and issubclass(arm, Enum)]
    if enums:  # transformers writes `Enum | str`: any text would pass here and fail later, without its line
        choices = [member.value for member in enums[0]]
    if isinstance(entry.value, dict) and any(
        isinstance(arm, type) and issubclass(arm, Section) for arm in get_args(hint)
    ):
        return entry.value  # the configuration's own class reads it
    adapter = _adapter(cls, key)
    # a word that YAML reads as a number or a truth value may be meant as text; one item may be meant as a list
    candidates = [entry.value] if entry.text is None else [entry.value, entry.text, [entry.text]]
    problem = ""
    for candidate in candidates:
        try:
            value = adapter.validate_python(candidate)
        except ValidationError as error:
            problem = problem or error.errors()[-1]["msg"]
            continue
        if isinstance(candidate, bool) and type(value) in (int, float):
            problem = "Input should be a number"
            continue
        if choices and value is not None and _plain(value) not in choices:
            near = nearest(str(value), choices) if len(choices) > 12 else None
            valid = f"nearest valid: {near}" if near else f"valid: {', '.join(choices[:12])}"
            raise ConfigError(f"{entry.where}: {key} cannot be {_plain(value)!r}; {valid}")
        outside = problem_with(key, value)
        if outside:
            raise ConfigError(f"{entry.where}: {outside}", key=key)
        return value
    shown = str(masked(entry.text if entry.text is not None else entry.value, key))
    problem = problem[0].lower() + problem[1:]
    raise ConfigError(
        one_line(f"{entry.where}: {key}: {problem} (a value of type {_type_name(hint)}), not {shown!r:.200}")
    )


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def _build(cls: type, arguments: dict[str, Any], entries: dict[str, Entry], config_file: str | None) -> Any:
    try:
        return cls(**arguments)
    except REFUSALS as error:  # from the __post_init__ of transformers, trl and our configs
        raise _placed(error, entries, config_file, _culprit(cls, arguments, error)) from error


def _culprit(cls: type, arguments: dict[str, Any], error: Exception) -> str | None:
    """The option that a constructor's error is about: the one that it names, or the one without which there is none."""
    named = [name for name in re.findall(r"[A-Za-z_]\w*", str(error)) if name in arguments]
    if named or getattr(error, "key", None):
        return named[0] if named else None
    for key in arguments:
        try:
            cls(**{name: value for name, value in arguments.items() if name != key})
        except REFUSALS:
            continue
        return key
    return None


def _check_required(run: RunConfig, config_file: str | None) -> None:
    required = {
        "model_name_or_path": run.model.model_name_or_path,
        "dataset_name": run.data.datasets or run.data.dataset_name,
    }
    if run.method.rewards and run.given.get("environment") is None:  # which has a reward of its own
        required["rewards"] = run.rewards
    missing = [key for key, value in required.items() if not value]
    if missing:
        place = f"in {config_file} or on the command line" if config_file else "on the command line or in a --config"
        raise ConfigError(f"`align {run.method.name}` needs {' and '.join(missing)}, to be set {place}")


def settings(run: RunConfig) -> dict[str, Any]:
    """What makes this run differ from the defaults: everything that was set, without secrets, then what the machine
    decided.

    Call it before a trainer is built: trainers change their config.
    """
    config: Any = type(run.training)
    decided = {
        name: getattr(run.training, name)
        for name in own_fields(config)
        if name not in run.given and _fields(config)[name].default is None and hints(config)[name] == bool | None
    }
    given = {key: masked(value, key) for key, value in run.given.items()}
    return {"method": run.method.name, **given, **{k: v for k, v in decided.items() if v is not None}}


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value


def write_settings(values: dict[str, Any], path: str | Path) -> None:
    """Write what `settings` returned as a file that `align <method> --config` reads back."""
    with open(path, "w", encoding="utf-8") as file:
        yaml.safe_dump(values, file, sort_keys=False, allow_unicode=True)
