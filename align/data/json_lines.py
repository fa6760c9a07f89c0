"""Which line of a .jsonl file is at fault, found while it streams: the file may be larger than the memory.

`datasets` takes the columns' types from the first 10 MiB. Where a later line has another type, it writes the values of
that column in all lines of the same 10 MiB as JSON into their texts (`"yes"` with its quotation marks), and where a
line is broken it reads the whole file anew into memory. So both are looked for before it reads.
"""

import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from align.data.files import opened, suffix_of
from align.errors import DataError

TYPED = 10 << 20
"""Bytes from which `datasets` takes the types of the columns (its `chunksize`)."""
KINDS: dict[type, str] = {
    **{str: "text", bool: "true or false", int: "a whole number", float: "a number"},
    **{list: "a list", dict: "an object"},
}

Shape = dict[str, set[str]]
"""The kinds of value at each place: {"prompt": {"a list"}, "prompt[]": {"an object"}, "prompt[].content": {"text"}}."""


def check_lines(files: list[Path]) -> None:
    """DataError for the first fault of these JSON Lines files."""
    fault = faulty_line(files)
    if fault:
        raise DataError(fault)


def faulty_line(files: list[Path]) -> str | None:
    """The first line that is broken, or whose columns or types are not those of the first 10 MiB; None if there is
    none. Memory does not grow with the files: Arrow reads them in parts, and a part that it refuses is read by line."""
    beginning, schema, known = b"", None, None
    for file in files:
        number = 1
        with opened(file) as lines:
            while part := lines.read(TYPED):
                part += lines.readline()
                found, whole = _read(part, schema)
                if not whole:
                    if known is None:
                        known = _shape(beginning)
                    fault = _fault_in(part, file, number, known)
                    if fault:
                        return fault
                if not beginning:
                    beginning, schema = part, found
                number += part.count(b"\n")
    return None


def _read(part: bytes, schema: Any) -> tuple[Any, bool]:
    """The Arrow schema of whole lines, and whether Arrow reads them with that of the beginning, `schema`."""
    import pyarrow as pa
    from pyarrow import json as arrow

    options = arrow.ParseOptions(explicit_schema=schema, unexpected_field_behavior="error" if schema else "infer")
    try:
        table = arrow.read_json(io.BytesIO(part), parse_options=options)
        table.validate(full=True)  # UTF-8
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return None, False
    return table.schema, True


def _shape(beginning: bytes) -> Shape:
    known: Shape = {}
    for line in beginning.split(b"\n"):
        if line.strip():
            for place, kind in _kinds(json.loads(line.decode("utf-8-sig"))):
                known.setdefault(place, set()).add(kind)
    return known


def _fault_in(part: bytes, file: Path, first: int, known: Shape) -> str | None:
    """The first fault of whole lines, of which the first has this number. known: empty for the beginning itself, whose
    types may differ: `datasets` keeps them as JSON."""
    for number, line in enumerate(part.split(b"\n"), start=first):
        if line.strip():
            where = f"{file}, line {number}"
            try:
                row = row_of(line, where)
            except DataError as error:
                return str(error)
            if known and (odd := _odd(_kinds(row), known)):
                return f"{where}: {odd}. Make all lines alike."
    return None


def are_lines(file: Path) -> bool:
    """Whether the first line is a whole object: a .json file may also be one array, or one object of several lines."""
    with opened(file) as lines:
        first = next((line for line in lines if line.strip()), b"")
    try:
        return isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return suffix_of(file) == ".jsonl" and not first.lstrip().startswith(b"[")


def row_of(line: bytes, where: str) -> dict[str, Any]:
    """The row that a line holds. where: file and line, for errors. DataError for a line without one."""
    try:
        row = json.loads(line.decode("utf-8-sig").rstrip())
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text (byte {error.start} of the line: {error.reason}).") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON: {error.msg} (character {error.pos} of the line).") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: {type(row).__name__} instead of an object with the columns.")
    return row


def _kinds(row: dict) -> Iterator[tuple[str, str]]:
    """(place, kind) of all values in a row, those that are null with the kind ""."""
    values: list[tuple[str, Any]] = list(row.items())
    while values:
        place, value = values.pop()
        yield place, "" if value is None else KINDS[type(value)]
        if isinstance(value, dict):
            values += [(f"{place}.{name}", inner) for name, inner in value.items()]
        elif isinstance(value, list):
            values += [(f"{place}[]", inner) for inner in value]


def _odd(found: Iterable[tuple[str, str]], known: Shape) -> str | None:
    """What a row has that no line of the beginning had. Below a place of several kinds anything may stand: `datasets`
    keeps it as JSON."""
    for place, kind in found:
        before = known.get(place)
        if kind == "" or (before is not None and (kind in before or len(before - {""}) > 1)):
            continue
        if kind == "a whole number" and before is not None and "a number" in before:
            continue
        if before is None:
            if _of_objects(place, known):
                return f"{place!r} is {kind}, and the lines before have no {place!r}"
            continue
        return f"{place!r} is {kind}, and {' or '.join(sorted(before - {''})) or 'null'} in the lines before"
    return None


def _of_objects(place: str, known: Shape) -> bool:
    """Whether all that this place is in has one kind in the beginning."""
    above = place.rpartition(".")[0]
    while above:
        if len(known.get(above, set()) - {""}) != 1:
            return False
        above = above.removesuffix("[]") if above.endswith("[]") else above.rpartition(".")[0]
    return True


def broken_array(file: Path) -> str | None:
    """The fault of a .json file that is one array."""
    try:
        with opened(file) as text:
            rows = json.loads(text.read().decode("utf-8"))
    except UnicodeDecodeError as error:
        return f"{file}: not UTF-8 text (byte {error.start}: {error.reason})."
    except json.JSONDecodeError as error:
        return f"{file}, line {error.lineno}: not valid JSON: {error.msg}."
    number, row = next(((number, row) for number, row in enumerate(rows) if not isinstance(row, dict)), (0, None))
    return f"{file}, item {number}: {type(row).__name__} instead of an object with the columns." if row else None
