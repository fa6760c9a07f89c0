"""Reading YAML files and command-line overrides, each value with the place it came from.

Scalars follow YAML 1.2's core schema (what YAML users expect, and JSON): `5e-7` is a number, `no` and `on` are words,
`010` is not octal. PyYAML's default is YAML 1.1, in which all three are traps.
"""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import yaml
from yaml.constructor import ConstructorError

from align.config import configs_dir
from align.errors import ConfigError

COMMAND_LINE = "command line"
SHORT_FOR = {"rollout": "backend"}  # of a section that one word stands for: the option that the word is
MOST_PLACES = 10_000  # of the values of one file: an anchor that is used by anchors can stand for billions


@dataclass
class Entry:
    """One value: `value` as parsed, `text` as written (scalars and the command line only), `where` it was written.

    nested: the places of the keys inside a nested value, by dotted path (`rewards.0.path`). reached: those of the
    dotted keys that were set in it afterwards. below: the number of files that extend the one it was written in, one
    through the other; -1 of the command line.
    """

    value: Any
    text: str | None
    where: str
    nested: dict[str, str] = field(default_factory=dict)
    reached: list[str] = field(default_factory=list)
    below: int = 0

    @property
    def places(self) -> str:
        """Where it was written, and from where it was changed."""
        return "; ".join(dict.fromkeys([self.where, *self.reached]))

    def place(self, key: str) -> str:
        """Where the dotted key was written, or the nearest key above it that was."""
        while key:
            if key in self.nested:
                return self.nested[key]
            key = key.rpartition(".")[0]
        return self.places


class _CoreLoader(yaml.SafeLoader):
    """YAML 1.2's core schema and nothing else: tags of other kinds are refused, with their line."""

    yaml_implicit_resolvers: dict = {}
    yaml_constructors: ClassVar[dict] = {None: yaml.SafeLoader.yaml_constructors[None]}


def _scalar(kind: str, read):
    def construct(loader: _CoreLoader, node: yaml.ScalarNode):
        text = loader.construct_scalar(node)
        try:
            return read(text)
        except (KeyError, ValueError) as error:
            raise ConstructorError(None, None, f"{text!r:.40} is no {kind}", node.start_mark) from error

    return construct


_TRUTH = {"true": True, "false": False}
for _tag, _pattern, _first, _read in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""], lambda text: None),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF"), lambda text: _TRUTH[text.lower()]),
    ("int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789"), int),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan",
        list("-+.0123456789"),
        lambda text: float(text.replace(".inf", "inf").replace(".nan", "nan")),
    ),
):
    _CoreLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)
    _CoreLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", _scalar(_tag, _read))
_CoreLoader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"^(?:<<)$"), ["<"])
for _tag in ("str", "seq", "map"):
    _name = f"tag:yaml.org,2002:{_tag}"
    _CoreLoader.add_constructor(_name, yaml.SafeLoader.yaml_constructors[_name])


def parse_value(text: str) -> Any:
    """A command-line value as YAML; text that is no YAML, refers to an anchor (which might hold itself) or has what
    would begin a comment (`runs/try #3`) stands for itself."""
    try:
        if "*" in text and any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, _CoreLoader)):
            return text
        value = yaml.load(text, _CoreLoader)  # noqa: S506  (a SafeLoader)
        written = isinstance(value, str | None) and " #" in f" {text}" and text.strip()[0] not in "'\""
        return text.strip() if written else value
    except (yaml.YAMLError, RecursionError):
        return text


def one_line(text: str) -> str:
    """A text for an error: white space as single spaces, what cannot be printed as an escape."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(text.split()))


# ---- files ----------------------------------------------------------------------------------------------------------


def find_config(name: str | Path) -> Path:
    """The file of this path, or else the ready config of this name. ConfigError with the nearest name otherwise."""
    path, ready = Path(name), ready_configs()
    try:
        if path.is_file():
            return path
        if str(name) in ready:
            return ready[str(name)]
        folder = path.is_dir()
    except OSError as error:
        raise ConfigError(one_line(f"cannot read the config file {str(name)!r:.200}: {error.strerror}")) from error
    if folder:
        raise ConfigError(one_line(f"{name} is a folder, not a config file"))
    near = difflib.get_close_matches(path.stem, ready, n=1)
    hint = f"; nearest ready config: {near[0]}" if near else "; `align configs` lists the ready ones"
    raise ConfigError(one_line(f"there is no config file {name}{hint}"))


def ready_configs() -> dict[str, Path]:
    """The files of the ready configs by name (`dpo`, `base/pairs`)."""
    folder = configs_dir()
    files = [*sorted(folder.glob("*.yaml")), *sorted((folder / "base").glob("*.yaml"))]
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in files}


def read_file(path: str | Path) -> dict[str, Entry]:
    """The entries of a YAML file (or ready config), over those of the file that it `extends`, in the order of the
    files. Raises ConfigError with file and line."""
    return _read_with_base(find_config(path), [])


def _read_with_base(path: Path, above: list[Path]) -> dict[str, Entry]:
    """above: the files that extend this one, directly or not, the first one first."""
    own = _read_one(path)
    for entry in own.values():
        entry.below = len(above)
    entries: dict[str, Entry] = {}
    base = own.pop("extends", None)
    if base is not None:
        chain = [*above, path]
        found = _base_file(base, path)
        if found.resolve() in [file.resolve() for file in chain]:
            circle = " -> ".join(str(file) for file in [*chain, found])
            raise ConfigError(f"{base.where}: files extend each other in a circle: {circle}")
        entries = _read_with_base(found, chain)
    apply_overrides(entries, own.items())
    return entries


def _base_file(base: Entry, path: Path) -> Path:
    name = base.value
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{base.where}: extends names one config: a path to a .yaml file, or the name of a ready one")
    if name.endswith((".yaml", ".yml")):
        name = str(path.parent / name)
    elif name not in ready_configs():
        near = difflib.get_close_matches(name, ready_configs(), n=1)
        hint = f"nearest: {near[0]}" if near else "`align configs` lists them"
        raise ConfigError(one_line(f"{base.where}: extends: there is no ready config {name!r}; {hint}"))
    try:
        return find_config(name)
    except ConfigError as error:
        raise ConfigError(f"{base.where}: extends: {error}") from error


def _read_one(path: Path) -> dict[str, Entry]:
    """The entries of one file, without what it extends."""
    text = _text(path)
    try:
        loader = _CoreLoader(text)
        root = loader.get_single_node()
        if root is None:
            return {}
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"{path}, line 1: expected `key: value` lines")
        places = _Places(path)
        places.add(root, "")
        entries = {}
        for key, node in root.value:
            written = node.value if isinstance(node, yaml.ScalarNode) else None
            value = loader.construct_object(node, deep=True)
            nested = {name: place for name, place in places.found.items() if name.startswith(f"{key.value}.")}
            entries[str(key.value)] = Entry(value, written, places.found[str(key.value)], nested)
        return entries
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(
            f"{path}, line {line}: a character that no YAML file may have: {error.character:#x}"
        ) from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(one_line(f"{path}, line {line}: not valid YAML: {error.problem}")) from error
    except RecursionError as error:
        raise ConfigError(f"{path}, line 1: lists or mappings are nested too deeply") from error


def _text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(one_line(f"cannot read the config file {path}: {error.strerror}")) from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path}, line {line}: not UTF-8 (byte {content[error.start]:#x}): save the file in that encoding"
        ) from error


class _Places:
    """The place of every key, and of every item of a list, by its dotted path."""

    def __init__(self, path: Path):
        self.path = path
        self.found: dict[str, Any] = {}
        self.open: list[yaml.Node] = []  # what is being looked at, from the outside in

    def add(self, node: yaml.Node, prefix: str) -> None:
        """What lies in `node`. ConfigError for a key twice, a key that is no text, and what holds itself."""
        if isinstance(node, yaml.ScalarNode):
            return
        if any(node is other for other in self.open):
            raise ConfigError(f"{self._place(node)}: an anchor that holds itself")
        self.open.append(node)
        if isinstance(node, yaml.SequenceNode):
            for i, child in enumerate(node.value):
                self._note(f"{prefix}{i}", child)
                self.add(child, f"{prefix}{i}.")
        else:
            for key, child in node.value:
                self._add_key(key, child, prefix)
        self.open.pop()

    def _add_key(self, key: yaml.Node, child: yaml.Node, prefix: str) -> None:
        if not isinstance(key, yaml.ScalarNode) or "\n" in key.value:
            raise ConfigError(f"{self._place(key)}: a key must be one line of text")
        name = f"{prefix}{key.value}"
        if name in self.found and key.value != "<<":
            line = self.found[name].rpartition(" ")[2]
            raise ConfigError(one_line(f"{self._place(key)}: key {name!r} is already set on line {line}"))
        self._note(name, key)
        self.add(child, f"{name}.")

    def _note(self, name: str, node: yaml.Node) -> None:
        self.found[name] = self._place(node)
        if len(self.found) > MOST_PLACES:
            raise ConfigError(f"{self._place(node)}: more than {MOST_PLACES} values, counting each use of an anchor")

    def _place(self, node: yaml.Node) -> str:
        return f"{self.path}, line {node.start_mark.line + 1}"


# ---- command lines --------------------------------------------------------------------------------------------------


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
            overrides.append((key, Entry([parse_value(value) for value in values], None, COMMAND_LINE, below=-1)))
        else:
            text = values[0] if values else "true"
            overrides.append((key, Entry(parse_value(text), text, COMMAND_LINE, below=-1)))
    return overrides


def apply_overrides(entries: dict[str, Entry], overrides: Iterable[tuple[str, Entry]]) -> None:
    """Set values in place; a dotted key reaches into nested lists and mappings, and may add one item to a list."""
    for key, entry in overrides:
        head, *rest = key.split(".")
        if not rest:
            entries[head] = entry
            continue
        if head not in entries or entries[head].value is None:
            entries[head] = Entry(_empty(rest), None, entry.where)
        target = entries[head]
        if head in SHORT_FOR and isinstance(target.value, str):
            target.value = {SHORT_FOR[head]: target.value}
        target.text = None
        _set_nested(target.value, rest, entry.value, f"{entry.where}: {'--' * (entry.where == COMMAND_LINE)}{key}")
        kept = {name: place for name, place in target.nested.items() if not name.startswith(f"{key}.")}
        target.nested = {**kept, key: entry.where, **entry.nested}
        target.reached.append(entry.where)


def _set_nested(container: Any, parts: list[str], value: Any, what: str) -> None:
    part, *rest = parts
    place: str | int = part
    if isinstance(container, list):
        if not part.isdecimal() or int(part) > len(container):
            raise ConfigError(one_line(f"{what}: {part!r} is not an index of a list of {len(container)}"))
        place = int(part)
        if place == len(container):
            container.append(_empty(rest))
    elif not isinstance(container, dict):
        raise ConfigError(
            one_line(f"{what}: there is nothing below {container!r:.100} to set {part!r} in: give all of it anew")
        )
    if not rest:
        container[place] = value
        return
    if isinstance(container, dict) and container.get(place) is None:
        container[place] = _empty(rest)
    _set_nested(container[place], rest, value, what)


def _empty(parts: list[str]) -> Any:
    """What the next of these parts of a key can be set in."""
    return [] if parts and parts[0] == "0" else {}
