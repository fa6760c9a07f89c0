"""The nested sections of a configuration file: how each is read, and its JSON schema. Nothing here imports torch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from align.config.sections import Kinds, Section

OWN_CLASS = {"type": "string", "pattern": ":", "description": "A class of yours: path/file.py:Class."}


@dataclass(frozen=True)
class Nested:
    """One section. read: from a value and its dotted key. kinds: its class, or its classes. many: a list of them.
    text: one text stands for a section too. open: `type: path/file.py:Class` is a kind of the user's."""

    read: Callable[[Any, str], Any]
    kinds: Kinds | type[Section]
    many: bool = False
    text: bool = False
    open: bool = False


def nested_options() -> dict[str, Nested]:
    """Every nested section by its key."""
    from align.data.mixture import MixturePart, parse_mixture
    from align.reward_models.specs import REWARDS, parse_reward, parse_rewards
    from align.rollout.make import rollout_kinds, rollout_options
    from align.trainers.weighting import sections

    search, constraint = sections.SearchSection, sections.ConstraintSection
    return {
        "datasets": Nested(parse_mixture, MixturePart, many=True),
        "rewards": Nested(parse_rewards, REWARDS, many=True, text=True, open=True),
        "gold_reward": Nested(parse_reward, REWARDS, text=True, open=True),
        "rollout": Nested(rollout_options, rollout_kinds(), text=True, open=True),
        "constraints": Nested(sections.parse_constraints, constraint, many=True),
        "multipliers": Nested(sections.MULTIPLIERS.parse, sections.MULTIPLIERS),
        "dynamic_weights": Nested(sections.parse_dynamic_weights, sections.DYNAMIC_WEIGHTS, open=True),
        "threshold_search": Nested(sections.parse_search, search),
        "stop_at": Nested(sections.parse_stop, sections.StopSection),
    }


def nested_schema(name: str, nested: Nested, defs: dict[str, Any]) -> dict[str, Any]:
    """The JSON schema of a section, told apart by its discriminator. defs: where what it refers to is put."""
    kinds = nested.kinds
    if isinstance(kinds, Kinds):
        arms = [_section_schema(cls, defs, kinds, kind) for kind, cls in kinds.named.items()]
        if nested.open:
            own = {"type": "object", "properties": {kinds.by: OWN_CLASS}, "required": [kinds.by]}
            arms.append(own)
    else:
        arms = [_section_schema(kinds, defs)]
    if nested.text:
        arms.append({"type": "string"})
    if isinstance(kinds, Kinds) and kinds.name == "reward":
        defs["reward"] = {"anyOf": arms}
        arms = [{"$ref": "#/$defs/reward"}]
    if nested.many:
        arms = [*(arms if nested.text else []), {"type": "array", "items": {"anyOf": arms}}]
    return {"anyOf": [*arms, {"type": "null"}]}


def _section_schema(cls: type[Section], defs: dict[str, Any], kinds: Kinds | None = None, kind: str = "") -> dict:
    schema = cls.model_json_schema(ref_template="#/$defs/{model}")
    defs.update(schema.pop("$defs", {}))
    for key in getattr(cls, "nested", ()):  # a reward that is made of rewards
        schema["properties"][key] = {"type": "array", "items": {"$ref": "#/$defs/reward"}}
    if kinds is not None:
        schema["properties"] = {kinds.by: {"const": kind}, **schema["properties"], kinds.by: {"const": kind}}
        if cls is not kinds.default:
            schema["required"] = sorted({kinds.by, *schema.get("required", ())})
    return {**schema, "title": cls.label or cls.__name__}
