"""What an unknown name is answered with: of an option in a file, on the command line or in Python, or of a trainer's
argument. Nothing here imports torch."""

import difflib
import inspect
from collections.abc import Iterable

from align.config.other_names import ELSEWHERE, OTHER_NAMES, REMOVED
from align.errors import ConfigError


def name_here(name: str, valid: Iterable[str]) -> str | None:
    """What an option of `OTHER_NAMES` is called here (dotted), where it is one of `valid`."""
    ours = OTHER_NAMES.get(name)
    return ours if ours is not None and ours.partition(".")[0] in valid else None


def nearest(name: str, valid: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, list(valid), n=1)), None)


def removed(name: str) -> str | None:
    """What to say of an option of another library that has no single name here."""
    instead = REMOVED.get(name) or ELSEWHERE.get(name)
    return f"no option here. Instead: {instead}" if instead else None


def in_python(dotted: str) -> str:
    """`rollout.backend` as it is written in a call: `rollout={"backend": ...}`."""
    head, _, rest = dotted.partition(".")
    return f'{head}={{"{rest}": ...}}' if rest else head


INSTEAD = {
    "data_collator": "the batches of these trainers are of their own making: leave it out, and give rows in one of the "
    "formats of docs/data.md",
    "compute_loss_func": "write a subclass with compute_loss",
    "preprocess_logits_for_metrics": "compute_metrics gets the rewards of both answers here, no logits: leave it out",
    "optimizer_cls_and_kwargs": "optim and optim_args of the configuration, or optimizers=(optimizer, scheduler)",
    "rollout_func": "an environment (environment_factory, docs/environments.md), or a back-end of your own (engine, "
    "docs/architecture.md)",
}
"""Arguments of TRL's trainers that some or all of ours do not have, and what to do instead."""


def check_arguments(cls: type, given: Iterable[str], config: type | None = None, positional: int = 0) -> None:
    """Raises `ConfigError`, with what to write instead, for keyword arguments that `cls` does not take.

    config: the class of the configuration that `cls` takes as `args`, whose options are sometimes given to `cls`.
    positional: how many arguments were given without a name."""
    valid, order = _parameters(cls), _positional(cls)
    twice = [name for name in order[:positional] if name in given]
    if twice:
        raise ConfigError(
            f"{cls.__name__}: argument {order.index(twice[0]) + 1} is {twice[0]}, which is given by its name too: give "
            f"all but the first by name, in the order {', '.join(order[:6])} ..."
        )
    for name in given if valid else ():
        if name in valid:
            continue
        if config is not None and name in INSTEAD:
            raise ConfigError(f"{cls.__name__} takes no {name}. Instead: {INSTEAD[name]}", key=name)
        if config is not None and name in _parameters(config):
            raise ConfigError(
                f"{name} is an option of {config.__name__}: {cls.__name__}(args={config.__name__}({name}=...))",
                key=name,
            )
        ours, near = name_here(name, valid), nearest(name, valid)
        hint = f"it is {in_python(ours)} here" if ours else removed(name)
        if hint is None and config is not None and (option := name_here(name, _parameters(config))) is not None:
            hint = f"it is {in_python(option)} of {config.__name__} here"
        hint = hint or (f"nearest valid: {near}" if near else None)
        raise ConfigError(
            f"unknown argument {name} of {cls.__name__}; {hint or f'`help({cls.__name__})` lists them'}", key=name
        )


def _positional(cls: type) -> list[str]:
    """What `cls` itself takes without a name; what it hands on beyond these is not looked at."""
    owner = next(owner for owner in cls.__mro__ if "__init__" in vars(owner))
    parameters = list(inspect.signature(vars(owner)["__init__"]).parameters.values())[1:]
    return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]


def _parameters(cls: type) -> list[str]:
    """What `cls` takes by name; nothing where a class of the user's takes any name."""
    names: list[str] = []
    for owner in cls.__mro__:
        if "__init__" not in vars(owner):
            continue
        parameters = list(inspect.signature(vars(owner)["__init__"]).parameters.values())[1:]
        names += [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return names
        if not owner.__module__.startswith("align."):  # ours hand them on
            return []
    return names
