"""What the types of options take, for values that are given from Python. Files and command lines, whose words may be
read in several ways, are typed in `align.config.resolve`."""

import dataclasses
import json
import os
import types
from collections.abc import Collection, Iterable, Mapping
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin

from align.config.arguments import hints, init_fields, instead_of
from align.config.names import nearest
from align.config.secrets import masked
from align.errors import ConfigError

_WORDS = {int: "a whole number", float: "a number", str: "text", type(None): "None"}
_NOT_DECLARED = {"fsdp": bool}  # what transformers takes beside a field's type
# Words that transformers names in the help alone, and takes others for one of them.
_CHOICES = {"include_num_input_tokens_seen": ["no", "all", "non_padding", True, False]}


def check_types(cls: type, values: Mapping[str, Any]) -> None:
    """ConfigError for the first of these values of options of `cls` that is nothing its field takes."""
    for name, value in values.items():
        field = init_fields(cls).get(name)
        # a name without effect here takes its default, which is checked where the others are refused
        if field is None or instead_of(field) or value is None and field.default in (None, ""):
            continue
        hint, value = hints(cls)[name], item(value)
        if value is None and type(None) not in _arms(hint):
            default = (
                ""
                if field.default is dataclasses.MISSING
                else f": leave it out for its default, {_plain(field.default)!r}"
            )
            raise ConfigError(f"{name} must be {_words(hint)}, got None{default}", key=name)
        if not _takes(hint, value) and not isinstance(value, _NOT_DECLARED.get(name, ())):
            shown, kind = masked(value, name), type(value).__name__
            raise ConfigError(
                f"{name} must be {_words(hint)}, got {shown!r:.60} ({kind}){_hint(hint, value)}", key=name
            )
        choices = choices_of(cls, name)
        if choices and value is not None and _plain(value) not in choices:
            raise ConfigError(f"{name} {not_among(_plain(value), choices)}", key=name)


def check_options(cls: type, values: Mapping[str, Any], key: str) -> None:
    """ConfigError for entries of the option `key` that are no fields of `cls`, an options class of a library, or that
    these do not take."""
    valid = init_fields(cls)
    for name in values:
        if name not in valid:
            near = nearest(str(name), valid)
            hint = f"nearest valid: {near}" if near else f"valid: {', '.join(valid)}"
            raise ConfigError(f"{key}: unknown key {name}; {hint}", key=key)
    try:
        check_types(cls, values)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}", key=key) from error


def choices_of(cls: type, name: str) -> list[Any]:
    """The words that a field takes; none where it takes any."""
    # transformers writes `Enum | str`: any text would pass, and be refused without the option's name
    enums = [arm for arm in get_args(hints(cls)[name]) if isinstance(arm, type) and issubclass(arm, Enum)]
    given = init_fields(cls)[name].metadata.get("choices") or _CHOICES.get(name)
    return list(given or [member.value for one in enums for member in one])


def not_among(value: Any, choices: Collection) -> str:
    """What is said of a word that is none of the choices."""
    words = [str(choice) for choice in choices]
    near = nearest(str(value), words) if len(words) > 12 else None
    return f"cannot be {value!r:.60}; " + (f"nearest valid: {near}" if near else f"valid: {', '.join(words[:12])}")


def item(value: Any) -> Any:
    """Numbers of numpy or torch as Python's."""
    return value.tolist() if hasattr(value, "ndim") and hasattr(value, "tolist") else value


def take_types(options: Any) -> None:
    """Values that were meant for an option's type, as values of this type: numbers of numpy or torch, a path, 1 for
    True, one word or a tuple for a list, a mapping as JSON. ConfigError for other text where a mapping is taken."""
    cls: type = type(options)
    for name in init_fields(cls):
        given = getattr(options, name)
        value, kinds = item(given), {get_origin(arm) or arm for arm in _arms(hints(cls)[name])}
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if type(value) is int and value in (0, 1) and bool in kinds and not kinds & {int, float}:
            value = bool(value)
        if isinstance(value, str) and list in kinds and str not in kinds:
            value = [value]
        elif isinstance(value, Collection) and not isinstance(value, str | list | Mapping) and list in kinds:
            value = list(value)
        if isinstance(value, str) and dict in kinds and name.endswith("_kwargs"):
            value = _mapping(value, name)
        if value is not given:
            setattr(options, name, value)


def _mapping(text: str, name: str) -> dict[str, Any]:
    """JSON, as transformers' parser leaves it."""
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{name}: {text!r} is no mapping; write it as '{{\"key\": 1}}'", key=name) from error


def _arms(hint: Any) -> tuple:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _takes(hint: Any, value: Any) -> bool:
    return any(_one_takes(arm, value) for arm in _arms(hint))


def _one_takes(arm: Any, value: Any) -> bool:
    kind: Any = get_origin(arm) or arm
    inner = get_args(arm)
    if kind is Literal:
        return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in inner)
    if kind is bool:
        return isinstance(value, bool) or type(value) is int and value in (0, 1)
    if kind in (int, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is str:
        return isinstance(value, str | os.PathLike)
    if kind is list:
        alone = inner[:1] == (str,) and isinstance(value, str) and value != ""
        many = isinstance(value, Collection) and not isinstance(value, str | bytes | Mapping)
        return alone or many and all(_takes(one, item(part)) for part in value for one in inner)
    if kind is tuple:
        return isinstance(value, list | tuple) and len(value) == len(inner) and all(map(_takes, inner, value))
    if kind is dict:
        entries: Iterable = value.items() if isinstance(value, Mapping) else ()
        known = isinstance(value, Mapping) or dataclasses.is_dataclass(value) and not isinstance(value, type)
        return known and all(
            isinstance(key, str) and (not inner or _takes(inner[1], item(part))) for key, part in entries
        )
    return kind is Any or not isinstance(kind, type) or isinstance(value, kind)


def _words(hint: Any) -> str:
    """What a type takes, for an error."""
    words = dict.fromkeys(word for arm in _arms(hint) for word in (("True", "False") if arm is bool else (_word(arm),)))
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last


def _word(arm: Any) -> str:
    kind, inner = get_origin(arm) or arm, get_args(arm)
    if kind is Literal:
        return " or ".join(repr(one) for one in inner)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "text"
    if kind in (list, tuple):
        return f"a list of {_several(inner[0])}" if inner else "a list"
    if kind is dict:
        return f"a mapping to {_several(inner[1])}" if inner and inner[1] in _WORDS else "a mapping"
    return _WORDS.get(kind) or f"a {getattr(kind, '__name__', kind)}"


def _several(kind: Any) -> str:
    return {int: "whole numbers", float: "numbers", str: "texts", bool: "True or False"}.get(kind, "mappings")


def _hint(hint: Any, value: Any) -> str:
    """What to write instead of a number or a truth value in quotes."""
    arms = _arms(hint)
    if not isinstance(value, str) or str in arms:
        return ""
    word = value.strip()
    if bool in arms and word.lower() in ("true", "false"):
        return f": write {word.capitalize()}, without quotes"
    try:
        float(word)
    except ValueError:
        return ""
    return ": write it without quotes" if {int, float} & set(arms) else ""


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value
