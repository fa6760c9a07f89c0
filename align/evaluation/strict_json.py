"""Result files: plain Python, finite numbers only, replaced at once. A number that does not exist is null."""

import json
import math
import os
from pathlib import Path

import numpy as np

from align.errors import DataError


def plain(value, where: str):
    """numpy to plain Python, all the way down. `where` names the place in errors."""
    if isinstance(value, dict):
        return {str(key): plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}[{number}]") for number, item in enumerate(value)]
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise DataError(f"{where} is a {type(value).__name__}: a summary holds numbers, strings, lists and objects")


def refuse_non_finite(value, where: str) -> None:
    """Raise DataError, naming the place, for NaN and infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"{where} is {value}: a summary holds finite numbers, and null for one that does not exist")
    if isinstance(value, dict):
        for key, item in value.items():
            refuse_non_finite(item, f"{where}.{key}")
    if isinstance(value, list):
        for number, item in enumerate(value):
            refuse_non_finite(item, f"{where}[{number}]")


def finite(value: float | None) -> float | None:
    """The number, or None for one that does not exist."""
    return value if value is not None and math.isfinite(value) else None


def write_json(path: str | Path, content: dict) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return path
