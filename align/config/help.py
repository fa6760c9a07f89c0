"""`align <method> --help`: the method's own options first, transformers' hundred others last."""

import argparse
import dataclasses
import textwrap
from enum import Enum
from typing import Any, get_args

from align.config.resolve import hints, option_classes, own_fields, reward_sections
from align.methods import Method

_REWARDS_HELP = {
    "rewards": "what is optimised: a list of specs, as [{type: classifier, path: runs/reward}] (docs/rewards.md)",
    "gold_reward": "one reward spec, scored beside the others at every evaluation and never optimised",
}


class _Formatter(argparse.HelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32, width=110)


def format_help(method: Method, parser: argparse.ArgumentParser) -> str:
    """The help of one method; `parser` holds the options of the command itself (--config, --dry-run ...)."""
    classes = option_classes(method)
    own = own_fields(classes["training"])
    shown = argparse.ArgumentParser(
        prog=f"align {method.name}",
        usage=f"align {method.name} [--config FILE] [--KEY VALUE ...]",
        description=f"{method.help[0].upper()}{method.help[1:]}. Keys of the file and of the command line are the "
        "same; the command line wins, and a dotted key (--rewards.0.path X) reaches into nested values.",
        formatter_class=_Formatter,
        parents=[parser],
        add_help=False,
        argument_default=argparse.SUPPRESS,
    )
    group = shown.add_argument_group(f"method ({classes['training'].__name__})")
    _add(group, classes["training"], own)
    if method.ensemble:
        _add(group, classes["ensemble"])
    for name in reward_sections(method):
        group.add_argument(f"--{name}", metavar="YAML", help=_REWARDS_HELP[name])
    _add(shown.add_argument_group("data"), classes["data"])
    _add(shown.add_argument_group("model (trl.ModelConfig)"), classes["model"])
    inherited = [f.name for f in dataclasses.fields(classes["training"]) if f.init and f.name not in own]
    _add(shown.add_argument_group("training (transformers.TrainingArguments)"), classes["training"], inherited)
    return shown.format_help()


def _add(group: argparse._ArgumentGroup, cls: type, names: list[str] | None = None) -> None:
    for field in dataclasses.fields(cls):
        if not field.init or (names is not None and field.name not in names):
            continue
        if field.name == "debug":  # the command line's --debug is the command's own; transformers' is for files
            continue
        text = " ".join(str(field.metadata.get("help", "")).split())
        default = "" if field.default in (None, dataclasses.MISSING, "") else f" [{field.default}]".replace("%", "%%")
        kind = _type_name(hints(cls)[field.name])
        group.add_argument(f"--{field.name}", metavar=kind, help=textwrap.shorten(text, 400) + default)


def _type_name(hint: Any) -> str:
    arms = [arm for arm in get_args(hint) or (hint,) if arm is not type(None)]
    if all(arm in (bool, int, float, str) for arm in arms):
        return arms[0].__name__.upper()
    return "NAME" if any(isinstance(arm, type) and issubclass(arm, Enum) for arm in arms) else "YAML"
