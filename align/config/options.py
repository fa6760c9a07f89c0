"""The options of every method as plain records, read from a file: for help and mistakes that need no torch.

`options.json` beside this file is written by `python -m align.config.options` from the classes of the methods. It is
used where the installed transformers and trl, and the fields of our own classes, are those that it was written with.
With others the records are made from the classes, which takes the seconds that importing them takes, and kept in the
user's cache for the next time.
"""

import dataclasses
import hashlib
import json
import os
import re
import textwrap
from enum import Enum
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from align.config.arguments import hints, init_fields, option_classes, own_fields, reward_sections
from align.config.nested import nested_options, nested_schema
from align.config.types import choices_of
from align.methods import METHODS, Method

FILE = Path(__file__).with_name("options.json")
MADE_WITH = ("transformers", "trl")
PACKAGE = Path(__file__).resolve().parents[1]
OTHERS = (
    "config/arguments.py",
    "methods.py",
    "rollout/options.py",
    "reward_models/specs.py",
    "data/mixture.py",
)  # beside trainers
_DECLARATION = re.compile(rb"^    \w+: .*=.*$", re.MULTILINE)
_JSON_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string"}


@cache
def options_of(method_name: str) -> dict[str, dict[str, Any]]:
    """The options of a method by name, in the order of help.

    Each is a record: group (method, ensemble, rewards, data, model or training), type (as help shows it), help,
    default, choices, json (the JSON types of its values), keys (of nested options: what may stand in them, by kind).
    """
    content = json.loads(FILE.read_text(encoding="utf-8"))
    if content["made with"] != installed():
        content = kept()
    groups = content["methods"][method_name]
    return {name: content["options"][index] for name, index in groups.items()}


def kept() -> dict[str, Any]:
    """The records of the installed versions: from the user's cache, or made, and put there where that is possible."""
    made_with = installed()
    name = f"options-{hashlib.sha256(json.dumps(made_with).encode()).hexdigest()[:16]}.json"
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "align" / name
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["made with"] == made_with and content["methods"].keys() == METHODS.keys():
            return content
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        pass  # not there yet, or damaged
    content = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        own = path.with_suffix(f".{os.getpid()}")
        own.write_text(json.dumps(content), encoding="utf-8")
        os.replace(own, path)
    except OSError:
        pass  # a home that cannot be written to: made again the next time
    return content


def installed() -> dict[str, str]:
    """The versions of the libraries, and a digest of the lines that declare our own options."""
    files = [*sorted((PACKAGE / "trainers").rglob("*.py")), *(PACKAGE / name for name in OTHERS)]
    lines = [line for file in files for line in _DECLARATION.findall(file.read_bytes())]
    digest = hashlib.sha256(b"\n".join(lines)).hexdigest()[:16]
    return {**{name: version(name) for name in MADE_WITH}, "declarations": digest}


def make() -> dict[str, Any]:
    """What belongs into the file: every different record once, and each method's options by name."""
    options: list[dict] = []
    methods: dict[str, dict[str, int]] = {}
    for name, method in METHODS.items():
        methods[name] = {}
        for option, record in _records(method).items():
            if record not in options:
                options.append(record)
            methods[name][option] = options.index(record)
    return {"made with": installed(), "methods": methods, "options": options}


def _records(method: Method) -> dict[str, dict[str, Any]]:
    classes = option_classes(method)
    own = own_fields(classes["training"])
    records = {
        name: _record("method", classes["training"], field)
        for name, field in init_fields(classes["training"]).items()
        if name in own
    }
    if method.ensemble:
        records |= {
            name: _record("ensemble", classes["ensemble"], f) for name, f in init_fields(classes["ensemble"]).items()
        }
    for name in reward_sections(method):
        records[name] = {"group": "rewards", **_REWARDS[name], "keys": _keys(name)}
    for group in ("data", "model", "training"):
        for name, field in init_fields(classes[group]).items():
            records.setdefault(name, _record(group, classes[group], field))
    return records


_REWARDS: dict[str, dict[str, Any]] = {
    "rewards": {
        "type": "YAML",
        "help": "what is optimised: a list of specs, as [{type: classifier, path: runs/reward}] (docs/rewards.md)",
        "json": ["array"],
    },
    "gold_reward": {
        "type": "YAML",
        "help": "one reward spec, scored beside the others at every evaluation and never optimised",
        "json": ["object", "string"],
    },
}


def _record(group: str, cls: type, field: dataclasses.Field) -> dict[str, Any]:
    hint = hints(cls)[field.name]
    arms = [arm for arm in get_args(hint) or (hint,) if arm is not type(None)]
    if get_origin(hint) is Literal:
        arms = list(dict.fromkeys(type(value) for value in arms))
    enums = [arm for arm in arms if isinstance(arm, type) and issubclass(arm, Enum)]
    choices = choices_of(cls, field.name)
    plain = [arm for arm in arms if arm in _JSON_TYPES]
    kind = "NAME" if enums else arms[0].__name__.upper() if plain == arms else "YAML"
    default = field.default.value if isinstance(field.default, Enum) else field.default
    text = str(field.metadata.get("help", "")).replace("%%", "%")  # transformers doubles it, for argparse
    record: dict[str, Any] = {
        "group": group,
        "type": kind,
        "help": textwrap.shorten(" ".join(text.split()), 400),
    }
    if isinstance(default, bool | int | float | str):
        record["default"] = default
    if choices:
        record["choices"] = choices
    if plain == arms:
        allowed = {_JSON_TYPES[arm] for arm in plain} | ({"null"} if type(None) in get_args(hint) else set())
        record["json"] = sorted(allowed)
    keys = _keys(field.name) if group in ("method", "data") else {}
    return {**record, "keys": keys} if keys else record


def _keys(name: str) -> dict[str, dict[str, str]]:
    """The keys of nested options with their help, by kind."""
    from align.data.mixture import MixturePart
    from align.reward_models.specs import REWARDS
    from align.rollout.make import rollout_kinds
    from align.trainers.weighting.sections import (
        DYNAMIC_WEIGHTS,
        MULTIPLIERS,
        ConstraintSection,
        SearchSection,
        StopSection,
    )

    sections: dict[str, dict[str, Any]] = {
        "datasets": {"": MixturePart},
        "rewards": REWARDS.named,
        "gold_reward": REWARDS.named,
        "constraints": {"": ConstraintSection},
        "multipliers": {cls.label: cls for cls in MULTIPLIERS.named.values()},
        "dynamic_weights": DYNAMIC_WEIGHTS.named,
        "threshold_search": {"": SearchSection},
        "stop_at": {"": StopSection},
        "rollout": {f"backend {name}": cls for name, cls in rollout_kinds().named.items()},
    }
    return {
        kind: {key: cls.model_fields[field].description or "" for key, field in cls.keys().items()}
        for kind, cls in sections.get(name, {}).items()
    }


def json_schema(method_name: str) -> dict[str, Any]:
    """The JSON schema of a method's configuration files, for editors."""
    properties: dict[str, Any] = {
        "method": {"const": method_name},
        "extends": {"type": "string", "description": "A path to a .yaml file, or the name of a ready config."},
    }
    nested, defs = nested_options(), dict[str, Any]()
    for name, record in options_of(method_name).items():
        entry: dict[str, Any] = {"description": record["help"]}
        if "json" in record:
            entry["type"] = record["json"]
        if "choices" in record:
            entry["enum"] = [*record["choices"], None]
        if "default" in record:
            entry["default"] = record["default"]
        if name in nested:
            entry = {"description": record["help"], **nested_schema(name, nested[name], defs)}
        properties[name] = entry
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"align {method_name}",
        "type": "object",
        "properties": properties,
        "$defs": defs,
        "patternProperties": {r"^\w+\.[\w.]+$": {"description": "A dotted key reaches into nested values."}},
        "additionalProperties": False,
    }


if __name__ == "__main__":
    FILE.write_text(json.dumps(make(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"wrote {FILE}")
