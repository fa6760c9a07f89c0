"""Nested sections of a configuration (`constraints`, `rewards` ...) as typed options, with one form of error for all.

A section is a class with fields (`Section`, a pydantic model); where several kinds of a section exist they are told
apart by a key (`Kinds`). Both take plain mappings, from a file and from Python alike, and what they refuse is a
`ConfigError` in one line whose `key` is the dotted path of the option at fault, so that a reader of files can name the
line. Nothing here imports torch, so that a mistake is told at once.
"""

import difflib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from align.config.other_names import END, STOPS
from align.config.secrets import masked
from align.errors import ConfigError


class Section(BaseModel):
    """Options of one section: fields with types, ranges and descriptions. Unknown keys and non-finite numbers are
    refused. `label` is what an error calls it ("a rule reward")."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True, arbitrary_types_allowed=True
    )
    label: ClassVar[str] = ""

    @classmethod
    def keys(cls) -> dict[str, str]:
        """The keys as they are written in a file, each with the name of its field."""
        required_first = sorted(cls.model_fields.items(), key=lambda field: not field[1].is_required())
        return {info.alias or name: name for name, info in required_first}

    def given(self) -> dict[str, Any]:
        """The options that were set, as a plain mapping that `parse` reads back."""
        names = self.keys().items()
        return {key: plain(getattr(self, name)) for key, name in names if name in self.model_fields_set}

    def __reduce_ex__(self, protocol: Any) -> Any:
        """In a pickle (`training_args.bin`) a plain mapping, where the class is of a file of the user's and no pickle
        finds it by its name."""
        cls = type(self)
        if getattr(sys.modules.get(cls.__module__), cls.__qualname__, None) is not cls:
            return dict, (self.given(),)
        return super().__reduce_ex__(protocol)


S = TypeVar("S", bound=Section)


def parse(cls: type[S], value: Any, key: str) -> S:
    """`value` (a mapping, or a `cls`) as a `cls`. key: the dotted path of the section, for errors."""
    if isinstance(value, cls):
        return value
    label = cls.label or key
    if not isinstance(value, Mapping):
        keys = ", ".join(cls.keys())
        raise ConfigError(f"{key}: expected a mapping with the keys {keys}, not {masked(value)!r:.100}", key=key)
    _check_names(cls, value, key, label)
    names, content = cls.keys(), dict(value)
    for name, option in content.items():
        arms = _arms(cls.model_fields[names.get(name, name)].annotation)
        if isinstance(option, bool) and {int, float} & arms and bool not in arms:
            raise ConfigError(f"{key}.{name}: input should be a number, not {option!r}", key=f"{key}.{name}")
        for arm in arms:
            if isinstance(arm, type) and issubclass(arm, Section) and option is not None:
                content[name] = parse(arm, option, f"{key}.{name}")
    try:
        return cls.model_validate(content)
    except ValidationError as error:
        raise _one_line(error, key, label, value) from None


def _check_names(cls: type[Section], value: Mapping, key: str, label: str) -> None:
    valid = cls.keys()
    for name in value:
        if name in valid or name in cls.model_fields:
            continue
        near = difflib.get_close_matches(str(name), valid, n=1)
        hint = f"nearest valid: {near[0]}" if near else f"valid: {', '.join(valid)}"
        hint = END if name in STOPS else hint
        of = "" if label == key else f" of {label}"
        raise ConfigError(f"unknown key {key}.{name}{of}; {hint}", key=f"{key}.{name}")
    required = [name for name, field_name in valid.items() if cls.model_fields[field_name].is_required()]
    missing = [repr(name) for name in required if value.get(name, value.get(valid[name])) in ("", None)]
    if missing:
        what = key if label == key else f"{key}: {label}"
        raise ConfigError(f"{what} needs {' and '.join(missing)}", key=key)


def _arms(annotation: Any) -> set:
    """The types of a field, without None and without what is noted beside them."""
    arms = get_args(annotation) or (annotation,)
    bare = [get_args(arm)[0] if get_origin(arm) is Annotated else arm for arm in arms]
    return {arm for arm in bare if arm is not type(None)}


def _one_line(error: ValidationError, key: str, label: str, value: Mapping) -> ConfigError:
    """pydantic's first finding as one line. What a validator of ours says is a whole sentence already."""
    found = error.errors()[0]
    path, content = key, value
    for part in found["loc"]:  # an option with several types is found once per type, which is no part of its path
        if isinstance(content, Mapping) and part in content:
            path, content = f"{path}.{part}", content[part]
        elif isinstance(content, list) and isinstance(part, int):
            path, content = f"{path}.{part}", content[part]
    message = found["msg"].removeprefix("Value error, ")
    if found["type"] == "value_error":
        return ConfigError(f"{path}: {message}", key=path)
    message = message[0].lower() + message[1:]
    shown = masked(found["input"], str(found["loc"][0]) if found["loc"] else "")
    return ConfigError(f"{path}: {message}, not {shown!r:.100}", key=path)


@dataclass(frozen=True)
class Kinds:
    """A section of which there are several kinds, told apart by the key `by`.

    name: what it is, for errors. kinds: the class of each value of `by`, in the order of help. default: the class where
    `by` is absent; None makes it required.
    """

    name: str
    kinds: dict[str, type[Section]]
    by: str = "type"
    default: type[Section] | None = field(default=None)

    @property
    def named(self) -> dict[str, type[Section]]:
        """Without the kinds that are places in files of the user's, which an earlier trainer of the process may have
        used: what help and errors may list."""
        return {kind: cls for kind, cls in self.kinds.items() if ":" not in kind}

    def parse(self, value: Any, key: str) -> Section:
        """The section that a mapping describes."""
        if isinstance(value, Section) and type(value) in self.kinds.values():
            return value
        if not isinstance(value, Mapping):
            raise ConfigError(f"{key}: expected a mapping with {self.by!r}, not {masked(value)!r:.100}", key=key)
        kind = value.get(self.by)
        cls = self.default if kind is None else self.kinds.get(kind) if isinstance(kind, str) else None
        if cls is None:
            near = difflib.get_close_matches(str(kind), self.named, n=1)
            hint = f"; nearest valid: {near[0]}" if near else ""
            place = f"{key}.{self.by}" if self.by in value else key
            raise ConfigError(f"{key}: {self.by} must be one of {', '.join(self.named)}, not {kind!r}{hint}", key=place)
        if self.by not in cls.model_fields:  # the kind says which class; the class does not repeat it
            value = {name: content for name, content in value.items() if name != self.by}
        for name in value:
            owners = [other for other, options in self.named.items() if name in options.keys()]
            if owners and name not in cls.keys():
                label = f"{self.by} {kind}" if kind else f"a {key} without {self.by!r}"
                raise ConfigError(
                    f"{key}.{name} is an option of {self.by} {' and '.join(owners)}, not of {label}",
                    key=f"{key}.{name}",
                )
        return parse(cls, value, key)


def parse_list(read, values: Any, key: str) -> list:
    """`read(value, key)` of each of a list's values; one value alone is refused with what to write."""
    if not isinstance(values, list | tuple):
        raise ConfigError(f"{key}: expected a list, not {masked(values)!r:.100}: put it in brackets, [...]", key=key)
    return [read(value, f"{key}.{i}") for i, value in enumerate(values)]


def plain(value: Any) -> Any:
    """Sections within a value as mappings: what can be written to JSON or YAML."""
    if isinstance(value, Section):
        return value.given()
    if isinstance(value, dict):
        return {name: plain(content) for name, content in value.items()}
    if isinstance(value, list | tuple):
        return [plain(content) for content in value]
    return value
