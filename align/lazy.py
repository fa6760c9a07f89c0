"""Loading objects by name, so that importing `align` costs nothing until something is used."""

import importlib
from typing import Any


def load(path: str) -> Any:
    """The object at `"package.module:attribute"`."""
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)
