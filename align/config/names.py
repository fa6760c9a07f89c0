"""What an unknown name is answered with: of an option in a file, on the command line or in Python, or of a trainer's
argument. Nothing here imports torch."""

import difflib
import inspect
from collections.abc import Iterable

from align.config.other_names import OTHER_NAMES
from align.errors import ConfigError

MOVED = {
    **OTHER_NAMES,
    # options of earlier versions
    "rollout_backend": "rollout.backend",
    "rollout_dtype": "rollout.dtype",
    "max_num_seqs": "rollout.max_num_seqs",
    "sync_tolerance": "rollout.sync_tolerance",
    "vllm_gpu_memory_utilization": "rollout.gpu_memory_utilization",
    "vllm_kv_cache_gib": "rollout.kv_cache_gib",
    "tokenizer": "processing_class",  # of trainers, as in transformers
}


def moved(name: str, valid: Iterable[str]) -> str | None:
    """What the option of an earlier version, or of another library, is called here (dotted), where it is one of
    `valid`."""
    now = MOVED.get(name)
    return now if now is not None and now.partition(".")[0] in valid else None


def nearest(name: str, valid: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, list(valid), n=1)), None)


def in_python(dotted: str) -> str:
    """`rollout.backend` as it is written in a call: `rollout={"backend": ...}`."""
    head, _, rest = dotted.partition(".")
    return f'{head}={{"{rest}": ...}}' if rest else head


def check_arguments(cls: type, given: Iterable[str], config: type | None = None) -> None:
    """Raises `ConfigError`, with what to write instead, for keyword arguments that `cls` does not take.

    config: the class of the configuration that `cls` takes as `args`, whose options are sometimes given to `cls`."""
    valid = _parameters(cls)
    for name in given if valid else ():
        if name in valid:
            continue
        if config is not None and name in _parameters(config):
            raise ConfigError(
                f"{name} is an option of {config.__name__}: {cls.__name__}(args={config.__name__}({name}=...))",
                key=name,
            )
        now, near = moved(name, valid), nearest(name, valid)
        hint = f"it is {in_python(now)} here" if now else f"nearest valid: {near}" if near else None
        raise ConfigError(
            f"unknown argument {name} of {cls.__name__}; {hint or f'`help({cls.__name__})` lists them'}", key=name
        )


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
