"""What is wrong with a value that only the run itself would find out, told when a configuration is read. Nothing here
imports torch."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from align.config.names import nearest
from align.errors import ConfigError
from align.lazy import check_place

COMPARED = (
    "method", "model", "adapter", "data", "rope_factors", "reference", "rewards", "gold_reward", "rows_per_step",
    "code",
)  # fmt: skip
"""What a resumed run is compared by beside its options (`align.trainers.core.identity`)."""

DEFAULT_FOLDER = "trainer_output"  # transformers'


def check_output_dir(value: Any) -> None:
    """ConfigError for an empty name, as of a variable of the shell that is not set: transformers takes it for its own
    default."""
    if value is None or not str(value).strip():
        raise ConfigError(
            f"output_dir is empty: name the folder of the run, or leave it out for {DEFAULT_FOLDER!r}", key="output_dir"
        )


def check_environment(value: Any, key: str = "environment") -> None:
    """ConfigError for what names no environment: a place, or a mapping of names to places."""
    if value is None:
        return
    if not isinstance(value, Mapping):
        return _check(value, "environment", key)
    if not value:
        raise ConfigError(f"{key} names no environment: NAME: path/file.py:Class", key=key)
    for name, place in value.items():
        _check(place, "environment", f"{key}.{name}")


def check_tools(value: Any, key: str = "tools") -> None:
    """ConfigError for what names no tools: a place, or a list of places."""
    if value is None:
        return
    for place in value if isinstance(value, list) else [value]:
        _check(place, "tool", key)


def _check(place: Any, what: str, key: str) -> None:
    if not isinstance(place, str):
        raise ConfigError(f"{key} must be path/file.py:name or package.module:name, not {place!r:.100}", key=key)
    try:
        check_place(place, what)
    except ConfigError as error:
        raise ConfigError(str(error), key=key) from error


def check_resume_changes(names: Any, known: Collection[str]) -> None:
    """ConfigError for a name that is nothing two runs could differ in. known: options, and `COMPARED`."""
    if names is None:
        return
    for name in names if isinstance(names, list) else [names]:
        head = str(name).partition(".")[0]
        if head not in known:
            near = nearest(head, known)
            hint = f"nearest valid: {near}" if near else f"valid are the run's options and {', '.join(COMPARED)}"
            raise ConfigError(f"resume_changes: {name!r} is no option of this run; {hint}", key="resume_changes")


def early_checks(options: Collection[str], *, resumed: bool) -> dict[str, Callable[[Any], None]]:
    """The check of each option that has one. options: names of the method's. resumed: from a checkpoint, which may be
    of an older version with options that are gone: the run looks into it."""
    checks: dict[str, Callable[[Any], None]] = {
        "output_dir": check_output_dir,
        "environment": check_environment,
        "tools": check_tools,
    }
    if not resumed:
        checks["resume_changes"] = lambda names: check_resume_changes(names, {*options, *COMPARED})
    return checks
