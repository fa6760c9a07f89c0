"""Which columns of CSV files are text: found over all rows, before `datasets` reads them.

It takes the types from the first 10,000 rows, as numbers where all cells look so. Later cells are made to fit: in a
column of text `007` became `7` there and `1e3` `1000`, and in one of whole numbers 1.5 was an error.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from align.data.formats import TEXT_COLUMNS

AT_ONCE = 10_000  # rows
EMPTY: dict[str, Any] = {"keep_default_na": False, "na_values": [""]}  # else the answer "None" would be missing


def text_or_missing(cell: str) -> str | None:
    """What a cell holds; pandas 2 leaves an empty one an empty text where pandas 3 takes it for missing."""
    return cell or None


def number_or_missing(cell: str) -> float | None:
    return float(cell) if cell else None


def csv_options(files: list[Path], texts: Collection[str], streaming: bool) -> dict[str, Any]:
    """Options for `datasets`' reader. texts: columns that are text whatever they look like, beside `TEXT_COLUMNS`.
    streaming: only the beginning of each file is looked at. ValueError for rows with more cells than the header has."""
    known, kinds = {*TEXT_COLUMNS, *texts}, dict[str, set[str]]()
    for file in files:
        _look(file, known, kinds, streaming)
    converters: dict[str, Any] = dict.fromkeys(sorted(known), text_or_missing)
    for name, found in kinds.items() if not streaming else ():
        if "text" in found or len(found) > 1:
            converters[name] = number_or_missing if found == {"whole", "number"} else text_or_missing
    return {"converters": converters, **EMPTY}


def _look(file: Path, known: set[str], kinds: dict[str, set[str]], beginning: bool) -> None:
    import pandas as pd

    with pd.read_csv(file, dtype=str, chunksize=AT_ONCE, nrows=AT_ONCE if beginning else None, **EMPTY) as parts:
        for part in parts:
            if not isinstance(part.index, pd.RangeIndex):
                raise ValueError(
                    f"the rows have more cells than the header has names ({', '.join(part.columns)}), so their columns "
                    "are not known. Put texts with commas into quotation marks, and end rows without a comma"
                )
            for name in part.columns.difference([*known]):
                found = kinds.setdefault(name, set())
                if "text" not in found:
                    found |= _kinds(part[name].dropna())


def _kinds(cells: Any) -> set[str]:
    """Of the cells of one column: "whole" numbers, "number", "truth", "text"; nothing where all are empty."""
    import pandas as pd

    if not len(cells):
        return set()
    if cells.isin(["true", "True", "TRUE", "false", "False", "FALSE"]).all():
        return {"truth"}
    numbers = pd.to_numeric(cells, errors="coerce")
    if numbers.isna().any() or cells.str.match(r"[+-]?0\d").any():
        return {"text"}
    return {"whole" if pd.api.types.is_integer_dtype(numbers) else "number"}
