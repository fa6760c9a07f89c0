"""Loading objects by name, so that importing `align` costs nothing until something is used."""

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from align.errors import AlignError

_HOME = Path(__file__).resolve().parent.parent  # the folder that holds align/, trainers/ and reward_models/
_SIBLINGS = ("trainers", "reward_models")  # names general enough that a user's own folder may have them


class PackageError(AlignError, ImportError):
    """A package of this library is missing, or another one is found in its place."""


def load(path: str) -> Any:
    """The object at `"package.module:attribute"`.

    Raises PackageError, an ImportError, with the remedy when a folder or module of the user's called `trainers` or
    `reward_models` is found in the place of this library's.
    """
    module, _, attribute = path.partition(":")
    package = module.partition(".")[0]
    if package in _SIBLINGS:
        check_not_shadowed(package)
    return getattr(importlib.import_module(module), attribute)


def check_not_shadowed(package: str, home: Path = _HOME) -> None:
    """Raise PackageError if `import package` would find something else than `home/package`."""
    spec = importlib.util.find_spec(package)
    ours = home / package
    if spec is None:
        raise PackageError(f"the package {package!r} of align-rlhf is not installed (expected {ours}); reinstall it")
    found = [Path(place).resolve() for place in spec.submodule_search_locations or []]
    if ours not in found[:1]:
        where = found[0] if found else spec.origin
        raise PackageError(
            f"`import {package}` finds {where}, which hides the package {package!r} of align-rlhf in {ours}. "
            f"Rename or move yours, start Python from another folder, or put {home} first on PYTHONPATH."
        )
