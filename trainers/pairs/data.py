"""Datasets of pairs as the loop takes them: tokenised, numbered, with the columns that a method needs."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from align.data.bad_rows import BadRow
from align.data.checks import check_pair_numbers
from align.data.formats import check_tokens, columns_of
from align.data.limits import lengths_of
from align.data.passes import numbered
from align.data.sets import rows_of
from align.data.streams import is_stream, read_whole, sample_of
from align.data.tokenize import tokenize_pairs
from align.data.tokenized import IDS, MASKS, WHOLE, limited_pairs
from align.data.turns import calls_tools, tokenize_turns
from align.errors import DataError

NUMBERS = ("margin", "chosen_prob")
"""Columns of numbers that reward models look at."""
SCORE_COLUMNS = ("chosen_score", "rejected_score")
AT_ONCE = 10_000
"""Rows whose tokens are looked up together: the places of tokens take several times the room of the tokens."""


@dataclass
class PairData:
    """How a run prepares its datasets.

    tokenizer, max_length, max_bad_share, num_proc: as `tokenize_pairs` takes them.
    columns: of the dataset, needed beside the tokens. optional: kept where they are there.
    further: tokenised pairs, train or eval -> the same with what the method computes for each of them.
    scored: the answers are read whole and scored, as `tokenize_pairs` has it, and tokenised pairs may be whole
    sequences, without a prompt of their own.
    turns: what tools say in an answer is masked (`align.data.turns`), with the columns `MASKS`.
    read: rows and the options of `tokenize_pairs` -> tokenised pairs, for a method whose rows are other ones; no
    streams.
    """

    tokenizer: Any
    max_length: int | None
    max_bad_share: float
    columns: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    further: Callable[[Any, str], Any] | None = None
    num_proc: int | None = None
    scored: bool = False
    turns: bool = False
    read: Callable[..., Any] | None = None

    def prepare(self, dataset, name: str):
        """Pairs in TRL's formats, or tokenised ones, with the columns of `IDS`, `row`, `columns` and `optional`; name:
        train or eval. A stream to train on stays one, without `further`; one to evaluate on is read whole."""
        if is_stream(dataset) and name == "eval":
            dataset = read_whole(dataset)
        options: dict[str, Any] = {
            "max_length": self.max_length,
            "max_bad_share": self.max_bad_share,
            "num_proc": self.num_proc,
        }
        if self.read is not None:
            dataset = self.read(dataset, self.tokenizer, **options)
        else:
            options |= {"scored": self.scored, "turns": self.turns, "streams": name == "train"}
            dataset = numbered_pairs(dataset, self.tokenizer, **options)
        if is_stream(dataset):
            return dataset
        if self.further is not None:
            dataset = self.further(dataset, name)
        _check_columns(dataset, self.columns, name)
        return dataset.select_columns(self.kept(dataset.column_names))

    def kept(self, names: Collection[str]) -> list[str]:
        """The columns that the loop takes, of a dataset with these."""
        optional = (*self.optional, *(MASKS if self.turns else ()))
        return [*IDS, "row", *self.columns, *(column for column in optional if column in names)]


def _check_columns(dataset, columns: Collection[str], name: str) -> None:
    """DataError unless the columns that a method names are there, with numbers in every row (lists of them too)."""
    missing = [column for column in columns if column not in dataset.column_names]
    if missing:
        raise DataError(f"{name}: the method's `columns` name {', '.join(missing)}, which the data set does not have")
    for column in columns:
        values = dataset.features[column]
        while (inner := getattr(values, "feature", None)) is not None:
            values = inner
        if not str(getattr(values, "dtype", "")).startswith(("int", "uint", "float", "double", "bool")):
            raise DataError(f"{name}: the column {column} must hold numbers, and holds {dataset.features[column]}")
        empty = dataset.select_columns([column]).with_format("arrow")[:][column].is_null().to_numpy()
        if empty.any():
            rows = [dataset[int(index)]["row"] for index in np.flatnonzero(empty)[:10]]
            raise DataError(f"{name}: the column {column} has no number in {int(empty.sum())} pairs: rows {rows}")


def with_score_margins(dataset, name: str, *, scale: float):
    """Tokenised pairs with the column `margin`: scale (chosen_score - rejected_score), in the units of the scores times
    `scale`. DataError where the scores are not there, no finite numbers, or say that the rejected answer is better."""
    from datasets import Value

    missing = [column for column in SCORE_COLUMNS if column not in dataset.column_names]
    if missing:
        raise DataError(
            f"{name}: score_margin needs the columns chosen_score and rejected_score, or completions with scores; "
            f"there is no {' and no '.join(missing)}"
        )
    try:
        chosen, rejected = (np.array(dataset[column][:], dtype=np.float64) for column in SCORE_COLUMNS)  # None: NaN
    except (ValueError, TypeError) as error:
        held = " and ".join(f"{column} holds {dataset.features[column]}" for column in SCORE_COLUMNS)
        raise DataError(f"{name}: score_margin needs numbers, and {held}") from error
    bad = np.flatnonzero(~(chosen >= rejected) | ~np.isfinite(chosen - rejected))
    if len(bad):
        rows = [dataset[int(index)]["row"] for index in bad[:10]]
        raise DataError(
            f"{name}: {len(bad)} pairs have scores that are no finite numbers, or a rejected_score above the "
            f"chosen_score, which would be a margin below 0: rows {rows}"
        )
    margins = scale * (chosen - rejected)
    if "margin" not in dataset.column_names:
        return dataset.add_column("margin", margins, feature=Value("float64"))
    if np.array_equal(
        dataset["margin"][:], margins
    ):  # prepared before, by what trains several members on the same rows
        return dataset
    raise DataError(f"{name}: the pairs have a column margin, and score_margin makes another one: leave one out")


def flat_column(dataset, column: str) -> tuple[np.ndarray, np.ndarray]:
    """(lengths [rows], values) of a column of lists: all values, row after row."""
    import pyarrow.compute as pc

    # chunk by chunk: one array of a `list` column holds 2^31 values at most
    chunks = dataset.select_columns([column]).with_format("arrow")[:][column].chunks
    lengths = [pc.list_value_length(chunk).to_numpy(zero_copy_only=False).astype(np.int64) for chunk in chunks]
    values = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in chunks]
    if not chunks:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    return np.concatenate(lengths), values[0] if len(values) == 1 else np.concatenate(values)


def list_column(values: np.ndarray, lengths: np.ndarray):
    """The other way round: a column whose rows have these lengths."""
    import pyarrow as pa

    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(values))


def beginnings(lengths: np.ndarray, values: np.ndarray, rows: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The first kept[i] values of row rows[i], one i after the other. lengths, values: of `flat_column`."""
    starts = (np.cumsum(lengths) - lengths)[rows]
    parts = [values[:0]]
    for first in range(0, len(rows), AT_ONCE):
        counts = kept[first : first + AT_ONCE]
        shifts = starts[first : first + AT_ONCE] - (np.cumsum(counts) - counts)
        parts.append(values[np.repeat(shifts, counts) + np.arange(counts.sum())])
    return np.concatenate(parts)


def numbered_pairs(
    dataset,
    tokenizer,
    *,
    max_length: int | None,
    max_bad_share: float,
    num_proc: int | None = None,
    scored: bool = False,
    turns: bool = False,
    streams: bool = False,
):
    """The output of `tokenize_pairs`. A dataset that is tokenised already has its completions cut at `max_length`, no
    empty ones and usable numbers; its rows are numbered where they have no column `row`. scored, turns: as
    `PairData` has them; tokenised pairs may then lack the column `prompt_ids`."""
    columns = columns_of(dataset, streams=streams)
    options: dict[str, Any] = {"max_length": max_length, "max_bad_share": max_bad_share, "num_proc": num_proc}
    if not set(IDS) <= columns:
        if scored and any({*pair} <= columns for pair in WHOLE) and not {"chosen", "rejected"} <= columns:
            check_tokens(dataset, next(pair for pair in WHOLE if {*pair} <= columns))
            return limited_pairs(dataset, tokenizer, **options)
        if turns and (masks := sorted({*MASKS} & columns)):
            raise DataError(
                f"the column {masks[0]!r} is of pairs that are tokenised, and would be taken for a 0 or 1 for each "
                "token: rename or remove it"
            )
        if turns and calls_tools(sample_of(dataset)):
            return tokenize_turns(dataset, tokenizer, **options)
        return tokenize_pairs(dataset, tokenizer, **options, scored=scored)
    check_tokens(dataset, (*IDS, *(name for name in MASKS if name in columns)))
    if is_stream(dataset):
        return limited_pairs(dataset, tokenizer, **options)
    lengths = lengths_above_0(dataset, IDS)
    longest = lengths["prompt_ids"] + np.maximum(lengths["chosen_ids"], lengths["rejected_ids"])
    if {*MASKS} & columns:
        check_masks(dataset)
    if max_length is not None and longest.max(initial=0) > max_length:
        return limited_pairs(dataset, tokenizer, **options)
    _check_numbers(dataset)
    return numbered(dataset)


def lengths_above_0(dataset, columns: Sequence[str], rows: str = "pairs") -> dict[str, np.ndarray]:
    """The tokens of each row of these columns, [rows]; DataError where one has none, a prompt's too: its first answer
    token would be predicted at the end of the row above. rows: what they are."""
    lengths = {column: lengths_of(dataset, column) for column in columns}
    for column, own in lengths.items():
        empty = np.flatnonzero(own == 0)
        if len(empty):
            raise DataError(f"{len(empty)} tokenised {rows} have an empty {column}: rows {empty[:10].tolist()}")
    return lengths


def check_masks(dataset) -> None:
    """DataError for masks that are not of their completions, or that leave nothing to train."""
    for ids, name in zip(IDS[1:], MASKS, strict=True):
        if name not in dataset.column_names:
            raise DataError(f"tokenised pairs have one of the columns {' and '.join(MASKS)}, and no {name}")
        (of_ids, _), (of_mask, values) = flat_column(dataset, ids), flat_column(dataset, name)
        wrong = np.flatnonzero((of_ids != of_mask) | (trained_lengths(dataset, ids) == 0))
        if len(wrong) or not np.isin(values, (0, 1)).all():
            raise DataError(f"{name} must have a 0 or 1 for each of {ids}, and a 1: rows {wrong[:10].tolist()}")


def trained_lengths(dataset, ids: str) -> np.ndarray:
    """The trained tokens of each row's completion; ids: the column of its tokens."""
    mask = MASKS[IDS.index(ids) - 1]
    if mask not in dataset.column_names:
        return lengths_of(dataset, ids)
    lengths, values = flat_column(dataset, mask)
    return np.bincount(np.repeat(np.arange(len(lengths)), lengths), values, len(lengths)).astype(np.int64)


def _check_numbers(dataset) -> None:
    names = [name for name in NUMBERS if name in dataset.column_names]
    for index, row in enumerate(rows_of(dataset, names) if names else ()):
        try:
            check_pair_numbers(row)
        except BadRow as reason:
            raise DataError(f"tokenised pairs, row {index}: {reason}") from reason
