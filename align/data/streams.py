"""Streamed rows: tokenised and checked as they are reached.

A stream has no length and no random access, so its first rows say what format it has, and its bad rows are found when
they are reached: none is trained.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from align.data.bad_rows import SHOWN, BadRows
from align.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from align.data.passes import Recipe

logger = logging.getLogger(__name__)

Row = dict[str, Any]
LOOKED_AT = 100
"""So many first rows tell the format, and so many are tokenised at once."""
SHARE_OF = 1000
"""Up to so many rows, `max_bad_share` is a share of this number: of few rows, one bad row is a large share."""


def is_stream(dataset: Any) -> bool:
    from datasets import IterableDataset

    return isinstance(dataset, IterableDataset)


def sample_of(dataset: Any, source: str = "") -> "Dataset":
    """A dataset itself; the first rows of a stream. DataError for a stream without rows."""
    from datasets import Dataset

    if not is_stream(dataset):
        return dataset
    name = source or dataset.info.dataset_name or "the stream"
    rows = list(islice(_read(dataset, name), LOOKED_AT))
    if not rows:
        raise DataError(f"{source or 'the stream'} has no rows: nothing to train on.")
    names = dict.fromkeys(name for row in rows for name in row)
    try:
        return Dataset.from_dict({name: [row.get(name) for row in rows] for name in names})
    except (ValueError, TypeError) as error:  # pyarrow's
        raise DataError(f"the first rows of {name} differ in their types: {error}") from error


def mapped(dataset: "IterableDataset", function: Callable[[Row, int], Row]) -> "IterableDataset":
    """function(row, its number) of every row. `dataset.map` would give the rows an epoch of their own, and a shuffled
    stream would come in one order in every pass."""
    from datasets import IterableDataset

    return IterableDataset.from_generator(_mapped, gen_kwargs={"parts": _Map(dataset, function)})


@dataclass
class _Map:
    """In one value, as `_Parts`."""

    dataset: Any
    function: Callable[[Row, int], Row]


def _mapped(parts: _Map) -> Iterator[Row]:
    for number, row in enumerate(parts.dataset):
        yield parts.function(row, number)


def read_whole(dataset: "IterableDataset") -> "Dataset":
    """All rows of a stream: an evaluation set is gone through again and again, and its rows are counted."""
    from datasets import Dataset

    rows = list(_read(dataset, "the stream to evaluate on"))
    if not rows:
        raise DataError("the stream has no rows: nothing to evaluate on.")
    names = dict.fromkeys(name for row in rows for name in row)
    return Dataset.from_dict({name: [row.get(name) for row in rows] for name in names})


def tokenized_stream(
    dataset: "IterableDataset", recipe: "Recipe", source: str, max_bad_share: float
) -> "IterableDataset":
    """One pass over a stream by a recipe, lazily. Rows count from 0 in the order in which they come, unless they have
    a whole number `row` of their own. DataError at the row with which more than `max_bad_share` of the rows are bad."""
    from datasets import IterableDataset

    return IterableDataset.from_generator(
        _tokenized, gen_kwargs={"parts": _Parts(dataset, recipe, source, max_bad_share)}
    )


@dataclass
class _Parts:
    """What a pass needs, in one value that `datasets` does not look into."""

    dataset: Any
    recipe: Any
    source: str
    max_bad_share: float


def _tokenized(parts: _Parts) -> Iterator[Row]:
    report = BadRows(source=parts.source)
    rows = enumerate(_read(parts.dataset, parts.source))
    names: Row = {}  # of the first rows: a row of a generator may lack one
    while block := list(islice(rows, LOOKED_AT)):
        names = names or dict.fromkeys(name for _, row in block for name in row)
        numbered = [{**names, **row, "row": row["row"] if isinstance(row.get("row"), int) else i} for i, row in block]
        kept, found = parts.recipe.batch(numbered)
        report.total += len(block)
        for number, kind, text in found:
            _tell(report, number, kind, text)
        if report.bad > parts.max_bad_share * max(report.total, SHARE_OF):
            raise DataError(report.refusal(parts.max_bad_share, of=max(report.total, SHARE_OF)))
        yield from kept


def _tell(report: BadRows, number: int, kind: str, text: str) -> None:
    """Note what was found, and log the first rows of each kind."""
    known = (report.reasons if kind == "reasons" else report.notes).get(text, [])
    if len(known) < SHOWN:
        logger.warning("%s, row %d, %s: %s", report.source, number, "dropped" if kind == "reasons" else "kept", text)
    if kind == "reasons":
        report.add(number, text)
    elif len(known) < SHOWN:
        report.note(number, text)


def _read(dataset: "IterableDataset", source: str) -> Iterator[Row]:
    from datasets.exceptions import DatasetsError

    number = -1
    rows = iter(dataset)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except DataError:  # of a stream that this one is made of
            raise
        except (DatasetsError, ValueError) as error:  # pyarrow's are ValueErrors
            where = f"after row {number}" if number >= 0 else "at its beginning"
            raise DataError(f"{source}, {where}: cannot be read: {error}") from error
        number += 1
        yield row
