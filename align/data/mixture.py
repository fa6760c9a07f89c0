"""Several datasets as one: which rows of each are trained, how often, and in which order."""

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field

from align.config.sections import Section, parse, parse_list
from align.data.formats import SCORED, TEXT_COLUMNS
from align.data.messages import HOLDERS, with_roles
from align.data.rows import load_rows
from align.errors import ConfigError, DataError

if TYPE_CHECKING:
    from datasets import Dataset


class MixturePart(Section):
    """One dataset of a mixture."""

    label: ClassVar[str] = "a dataset of the mixture"

    path: str = Field(description="as dataset_name: a file, a folder or a hub dataset")
    name: str | None = Field(default=None, description="configuration of a hub dataset")
    split: str = Field(default="train", description="split, which takes slices: train[:1000]")
    weight: float = Field(
        default=1.0,
        gt=0,
        le=1000,
        description="how often each row comes per epoch: 1 once; 0.3: 30 % of the rows, drawn with mixture_seed; 2.5: "
        "twice, and half of them once more",
    )
    columns: list[str] | None = Field(default=None, description="the columns to keep; default: all")


def parse_mixture(value: Any, key: str = "datasets") -> list[MixturePart]:
    """The parts that a list of mappings describes."""
    if isinstance(value, str):
        raise ConfigError(
            f"{key}: {value!r:.100} is no list: write dataset_name: {value} for one dataset, and for several "
            f"{key}: [{{path: {value}}}, ...]",
            key=key,
        )
    parts = parse_list(_part, value, key)
    if not parts:
        raise ConfigError(f"{key}: the list is empty: name a dataset, or leave {key} out", key=key)
    return parts


def _part(value: Any, key: str) -> MixturePart:
    if isinstance(value, str):
        raise ConfigError(
            f"{key}: {value!r:.100} is no section: write {{path: {value}}}, with split and weight where it needs them",
            key=key,
        )
    return parse(MixturePart, value, key)


def load_mixture(parts: list[MixturePart], seed: int) -> "Dataset":
    """The rows of an epoch of a mixture, in an order drawn with `seed`.

    Rows count from 0 through the datasets as they are listed (column `row`), whichever of them are taken: the
    description of the result (`info.description`) says which numbers are whose. A column that only some of the datasets
    have is null in the others.

    Raises DataError where the datasets have different formats, or a weight takes no row.
    """
    return mix([(load_rows(part.path, part.split, part.name), part) for part in parts], seed)


def mix(loaded: list[tuple["Dataset", MixturePart]], seed: int) -> "Dataset":
    """`load_mixture` of datasets that are loaded."""
    from datasets import concatenate_datasets

    names = [f"datasets.{index} ({part.path})" for index, (_, part) in enumerate(loaded)]
    datasets, taken, lines, first = [], [], [], 0
    for index, (rows, part) in enumerate(loaded):
        if part.columns is not None:
            missing = [name for name in part.columns if name not in rows.column_names]
            if missing:
                raise DataError(f"{names[index]} has no column {missing[0]!r}; it has: {', '.join(rows.column_names)}")
            rows = rows.select_columns(part.columns)
        rows = _with_roles(rows)
        drawn = _drawn(len(rows), part.weight, np.random.default_rng([seed, index]))
        if not len(drawn):
            raise DataError(f"{names[index]}: weight {part.weight:g} of {len(rows)} rows takes no row")
        lines.append(
            f"{len(drawn)} of {len(rows)} rows from {part.path} (weight {part.weight:g}, rows {first} to "
            f"{first + len(rows) - 1})"
        )
        if "row" in rows.column_names:
            rows = rows.remove_columns("row")
        datasets.append(rows.add_column("row", np.arange(first, first + len(rows))))
        taken.append(drawn + first)
        first += len(rows)
    _check_same_format(datasets, names)
    whole = concatenate_datasets(_of_one_type(datasets, names))
    order = np.concatenate(taken)
    mixed = whole.select(order[np.random.default_rng([seed, len(loaded)]).permutation(len(order))])
    mixed.info.dataset_name = "mixture of " + ", ".join(f"{part.path} x {part.weight:g}" for _, part in loaded)
    mixed.info.description = f"{len(order)} rows per epoch: {'; '.join(lines)}"
    return mixed


def _with_roles(rows: "Dataset") -> "Dataset":
    """Rows of ShareGPT's format with the columns and keys of the others, beside which they may stand."""
    talks = [name for name in HOLDERS if name in rows.column_names]
    features = {name: str(rows.features[name]) for name in talks}
    if not any("'from'" in feature for feature in features.values()):
        return rows
    renamed = ["conversations"] if "conversations" in talks and "messages" not in talks else []
    return rows.map(with_roles).remove_columns(renamed)


def _of_one_type(datasets: list["Dataset"], names: list[str]) -> list["Dataset"]:
    """With the columns of one name as one type: a .csv file has another kind of text than a .jsonl file, a margin may
    be whole numbers in one of them, and messages may have a `name` or `tool_calls`."""
    from datasets import Features

    types: dict[str, Any] = {}
    for rows, own in zip(datasets, names, strict=True):
        for column, kind in rows.features.items():
            common = _common(types.get(column, kind), kind)
            if common is None:
                raise DataError(
                    f"the datasets of the mixture have columns of different types: {column!r} of {own} is {kind}, and "
                    f"{types[column]} before: make them alike, or keep other columns (columns: [...])"
                )
            types[column] = common
    wanted = [Features({name: types[name] for name in rows.column_names}) for rows in datasets]
    return [rows if rows.features == own else rows.cast(own) for rows, own in zip(datasets, wanted, strict=True)]


def _common(one: Any, other: Any) -> Any:
    """The feature that holds the values of both; None where there is none."""
    from datasets import LargeList, List, Value

    if one == other:
        return one
    if isinstance(one, dict) and isinstance(other, dict):
        fields = {name: _common(one.get(name, other.get(name)), other.get(name, one.get(name))) for name in one | other}
        return None if None in fields.values() else fields
    lists = List | LargeList
    if isinstance(one, lists) and isinstance(other, lists):
        inner = _common(one.feature, other.feature)
        return None if inner is None else List(inner)
    if not (isinstance(one, Value) and isinstance(other, Value)):
        return None
    kinds = {one.dtype, other.dtype}
    if "null" in kinds:
        return one if other.dtype == "null" else other
    if kinds <= {"string", "large_string"}:
        return Value("large_string")
    numbers = all(kind.startswith(("int", "float")) for kind in kinds)
    whole = all(kind.startswith("int") for kind in kinds)
    return Value("int64" if whole else "float64") if numbers else None


def _drawn(count: int, weight: float, generator: np.random.Generator) -> np.ndarray:
    """The rows of `count` that a weight takes, some of them several times; round(weight x count) in all."""
    whole = int(weight)
    rest = np.sort(generator.permutation(count)[: round(weight * count) - whole * count])
    return np.concatenate([*[np.arange(count)] * whole, rest])


def _check_same_format(datasets: list["Dataset"], names: list[str]) -> None:
    """DataError where rows of one dataset would be bad in the format of another."""
    own = [{*rows.column_names} & {*TEXT_COLUMNS, *SCORED} for rows in datasets]
    for columns, name in zip(own, names, strict=True):
        if columns != own[0]:
            raise DataError(
                f"{names[0]} has the columns {', '.join(sorted(own[0])) or 'of no known format'} and {name} has "
                f"{', '.join(sorted(columns)) or 'those of no known format'}: datasets of a mixture have one format. "
                "Rename columns, or keep some of them (columns: [...])"
            )
