"""Entries of a file and a command line -> the typed configuration of one run."""

import dataclasses
import re
from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, get_args

import yaml

from align.config.arguments import (
    REWARD_SECTIONS,
    DataArguments,
    EnsembleArguments,
    hints,
    init_fields,
    option_classes,
    own_fields,
)
from align.config.early_checks import early_checks
from align.config.names import name_here, nearest, removed
from align.config.nested import nested_options
from align.config.options import options_of
from align.config.ranges import problem_with
from align.config.secrets import MASK, masked, masked_text
from align.config.sections import Section
from align.config.source import COMMAND_LINE, Entry, apply_overrides, one_line, read_file, read_overrides
from align.config.types import check_options, choices_of, not_among
from align.errors import AlignError, ConfigError
from align.methods import METHODS, Method, get_method

# What constructors of transformers and trl raise for options that they do not take.
REFUSALS = (AlignError, ValueError, TypeError, KeyError, AttributeError, ImportError, OSError, RuntimeError)


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
            if key in init_fields(cls):
                arguments[part][key] = value = _typed(key, entry, cls)
                as_written = dataclasses.is_dataclass(value) or type(entry.value) is int and entry.value == value
                given[key] = entry.value if as_written else _plain(value)
    if elsewhere and not torch.accelerator.is_available():
        arguments["training"].setdefault("use_cpu", True)  # transformers refuses bf16 without it
    nested: dict[str, Any] = {key: sections.get(key) for key in REWARD_SECTIONS}
    built = {part: _build(cls, arguments[part], entries, config_file) for part, cls in classes.items()}
    run = RunConfig(method=method, **built, **nested, entries=entries, given=given)
    _check_required(run, config_file)
    _check_unread(entries)
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
    _check_length(entries)
    for key, check in early_checks(options_of(method.name), resumed="resume_from_checkpoint" in entries).items():
        if key in entries:
            try:
                check(entries[key].value)
            except ConfigError as error:
                raise _placed(error, entries, config_file) from error
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


def _check_keys(entries: dict[str, Entry], valid: list[str], method: Method) -> None:
    problems = []
    for key, entry in entries.items():
        if key not in valid:
            dashes = "--" if entry.where == COMMAND_LINE else ""
            ours, near = name_here(key, valid), nearest(key, valid)
            hint = f"nearest valid: {dashes}{near}" if near else f"see `align {method.name} --help`"
            hint = f"it is {dashes}{ours} here" if ours else removed(key) or others_option(key, method) or hint
            problems.append(one_line(f"{entry.where}: unknown key {dashes}{key}; {hint}"))
    if problems:
        raise ConfigError("; ".join(problems))


def others_option(key: str, method: Method) -> str | None:
    """What to say of an unknown key that other methods have."""
    having = [name for name in METHODS if name != method.name and key in options_of(name)]
    return f"an option of {', '.join(having)}, which {method.name} has no use for" if having else None


def _placed(
    error: Exception, entries: dict[str, Entry], config_file: str | None, key: str | None = None
) -> ConfigError:
    """The error in one line, with the place of the option that it is about: `error.key`, or `key`."""
    key = getattr(error, "key", None) or key or ""
    head = key.partition(".")[0]
    place = entries[head].place(key) if head in entries else config_file or COMMAND_LINE
    kind = "" if isinstance(error, ValueError | AlignError) else f"{type(error).__name__}: "
    kind = f"{head}: {kind}" if head in entries and head not in str(error) else kind  # a library's may not name it
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
    choices = choices_of(cls, key)
    if isinstance(entry.value, dict) and any(
        isinstance(arm, type) and issubclass(arm, Section) for arm in get_args(hint)
    ):
        return entry.value  # the configuration's own class reads it
    for arm in get_args(hint):
        if isinstance(arm, type) and dataclasses.is_dataclass(arm) and isinstance(entry.value, dict):
            try:
                check_options(arm, entry.value, key)  # pydantic leaves out what it does not know
            except ConfigError as error:
                raise ConfigError(f"{entry.where}: {error}", key=key) from error
    adapter = _adapter(cls, key)
    # a word that YAML reads as a number or a truth value may be meant as text; one item may be meant as a list
    alone = entry.text is None or entry.value is None
    candidates = [entry.value] if alone else [entry.value, entry.text, [entry.text]]
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
            raise ConfigError(f"{entry.where}: {key} {not_among(_plain(value), choices)}", key=key)
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


_READ_WITH = {
    "use_peft": (("lora_", "use_rslora", "use_dora"), "train an adapter", "train all weights"),
    "load_in_4bit": (("bnb_4bit_", "use_bnb_nested_quant"), "hold the weights in 4 bits", "hold them as they are"),
}
"""Options of trl.ModelConfig that say what others mean: the names of those, and what true and false do."""


def _check_unread(entries: dict[str, Entry]) -> None:
    """ConfigError for options that nothing reads where the one that they belong to is not said at all."""
    for switch, (names, on, off) in _READ_WITH.items():
        given = [key for key in entries if key.startswith(names)]
        if given and switch not in entries:
            raise ConfigError(
                f"{entries[given[0]].where}: {given[0]} is not read without {switch}: set {switch}: true to {on}, or "
                f"{switch}: false to {off}",
                key=given[0],
            )


def _check_length(entries: dict[str, Entry]) -> None:
    """ConfigError for epochs that are asked for over a file with max_steps, which would decide in silence."""
    epochs, steps = entries.get("num_train_epochs"), entries.get("max_steps")
    if epochs is None or steps is None or epochs.below >= steps.below:
        return
    if not isinstance(steps.value, int | float) or steps.value <= 0:
        return
    raise ConfigError(
        f"{epochs.where}: num_train_epochs does nothing beside max_steps: {steps.value} ({steps.where}): "
        "add max_steps: -1 to train by epochs, or leave num_train_epochs out",
        key="num_train_epochs",
    )


def settings(run: RunConfig) -> dict[str, Any]:
    """What makes this run differ from the defaults: everything that was set, without secrets, then what the machine
    decided.

    Call it before a trainer is built: trainers change their config.
    """
    config: Any = type(run.training)
    decided = {
        name: getattr(run.training, name)
        for name in own_fields(config)
        if name not in run.given and init_fields(config)[name].default is None and hints(config)[name] == bool | None
    }
    given = {key: masked(value, key) for key, value in run.given.items()}
    return {"method": run.method.name, **given, **{k: v for k, v in decided.items() if v is not None}}


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value


def write_settings(values: dict[str, Any], path: str | Path) -> None:
    """Write what `settings` returned as a file that `align <method> --config` reads back."""
    with open(path, "w", encoding="utf-8") as file:
        yaml.safe_dump(values, file, sort_keys=False, allow_unicode=True)
