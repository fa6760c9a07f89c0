"""Reading YAML files and command-line overrides, each value with the place it came from.

Scalars follow YAML 1.2's core schema (what YAML users expect, and JSON): `5e-7` is a number, `no` and `on` are words,
`010` is not octal. PyYAML's default is YAML 1.1, in which all three are traps.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from align.errors import ConfigError

COMMAND_LINE = "command line"


@dataclass
class Entry:
    """One value: `value` as parsed, `text` as written (scalars and the command line only), `where` it was written.

    nested: the places of the keys inside a nested value, by dotted path (`rewards.0.path`).
    """

    value: Any
    text: str | None
    where: str
    nested: dict[str, str] = field(default_factory=dict)


class _CoreLoader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict = {}


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", list("-+.0123456789")),
    ("merge", r"<<", ["<"]),
):
    _CoreLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)


def parse_value(text: str) -> Any:
    """A command-line value as YAML; text that is no YAML stands for itself."""
    try:
        return yaml.load(text, _CoreLoader)  # noqa: S506  (a SafeLoader)
    except yaml.YAMLError:
        return text


def read_file(path: str | Path) -> dict[str, Entry]:
    """The top-level entries of a YAML file, in its order. Raises ConfigError with file and line."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"there is no config file {path}")
    loader = _CoreLoader(path.read_text(encoding="utf-8"))
    try:
        root = loader.get_single_node()
        if root is None:
            return {}
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"{path}, line 1: expected `key: value` lines")
        places: dict[str, str] = {}
        _find_keys(root, path, "", places)
        entries = {}
        for key, node in root.value:
            text = node.value if isinstance(node, yaml.ScalarNode) else None
            value = loader.construct_object(node, deep=True)
            nested = {name: place for name, place in places.items() if name.startswith(f"{key.value}.")}
            entries[str(key.value)] = Entry(value, text, places[str(key.value)], nested)
        return entries
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}, line {line}: not valid YAML: {error.problem}") from error
    finally:
        loader.dispose()


def _find_keys(node: yaml.Node, path: Path, prefix: str, places: dict[str, str]) -> None:
    """The place of every key by its dotted path; ConfigError when a mapping has a key twice."""
    if isinstance(node, yaml.SequenceNode):
        for i, child in enumerate(node.value):
            _find_keys(child, path, f"{prefix}{i}.", places)
    elif isinstance(node, yaml.MappingNode):
        for key, child in node.value:
            name = f"{prefix}{key.value}"
            place = f"{path}, line {key.start_mark.line + 1}"
            if name in places and key.value != "<<":
                raise ConfigError(f"{place}: key {name!r} is already set on line {places[name].rpartition(' ')[2]}")
            places[name] = place
            _find_keys(child, path, f"{name}.", places)


def read_overrides(tokens: list[str]) -> list[tuple[str, Entry]]:
    """`["--learning_rate", "5e-7", "--rewards.0.path=x"]` as (dotted key, entry) pairs, in order.

    An option without a value is true; one with several is a list. Hyphens in the first part of a key are underscores.
    """
    overrides = []
    position = 0
    while position < len(tokens):
        token = tokens[position]
        position += 1
        if not token.startswith("--") or token == "--":
            hint = f" (did you mean --config {token}?)" if token.endswith((".yaml", ".yml")) else ""
            raise ConfigError(f"{COMMAND_LINE}: unexpected argument {token!r}; options are --key value{hint}")
        key, equals, text = token[2:].partition("=")
        values = [text] if equals else []
        while not equals and position < len(tokens) and not tokens[position].startswith("--"):
            values.append(tokens[position])
            position += 1
        head, dot, tail = key.partition(".")
        key = head.replace("-", "_") + dot + tail
        if len(values) > 1:
            overrides.append((key, Entry([parse_value(value) for value in values], None, COMMAND_LINE)))
        else:
            text = values[0] if values else "true"
            overrides.append((key, Entry(parse_value(text), text, COMMAND_LINE)))
    return overrides


def apply_overrides(entries: dict[str, Entry], overrides: Iterable[tuple[str, Entry]]) -> None:
    """Set values in place; a dotted key reaches into nested lists and mappings, and may add one item to a list."""
    for key, entry in overrides:
        head, *rest = key.split(".")
        if not rest:
            entries[head] = entry
            continue
        if head not in entries or entries[head].value is None:
            entries[head] = Entry([] if rest[0] == "0" else {}, None, COMMAND_LINE)
        entries[head].text = None
        entries[head].nested[key] = COMMAND_LINE
        _set_nested(entries[head].value, rest, entry.value, key)


def _set_nested(container: Any, parts: list[str], value: Any, key: str) -> None:
    part, *rest = parts
    if isinstance(container, list):
        if not part.isdigit() or int(part) > len(container):
            raise ConfigError(f"{COMMAND_LINE}: --{key}: {part!r} is not an index of a list of {len(container)}")
        part = int(part)
        if part == len(container):
            container.append({})
    elif not isinstance(container, dict):
        raise ConfigError(f"{COMMAND_LINE}: --{key}: there is nothing below {container!r} to set {part!r} in")
    if not rest:
        container[part] = value
    else:
        if isinstance(container, dict):
            container.setdefault(part, {})
        _set_nested(container[part], rest, value, key)
