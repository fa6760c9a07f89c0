"""Datasets of pairs as the loop takes them: tokenised, numbered, with the columns that a method needs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from align.data.bad_rows import BadRow
from align.data.checks import check_pair_numbers
from align.data.formats import columns_of
from align.data.tokenize import tokenize_pairs
from align.errors import DataError

IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
NUMBERS = ("margin", "chosen_prob")
"""Columns of numbers that reward models look at."""


@dataclass
class PairData:
    """How a run prepares its datasets.

    tokenizer, max_length, max_bad_share, num_proc: as `tokenize_pairs` takes them.
    columns: of the dataset, needed beside the tokens. optional: kept where they are there.
    further: tokenised pairs, train or eval -> the same with what the method computes for each of them.
    """

    tokenizer: Any
    max_length: int | None
    max_bad_share: float
    columns: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    further: Callable[[Any, str], Any] | None = None
    num_proc: int | None = None

    def prepare(self, dataset, name: str):
        """Pairs in TRL's formats, or tokenised ones, with the columns of `IDS`, `row`, `columns` and `optional`; name:
        train or eval."""
        dataset = numbered_pairs(
            dataset,
            self.tokenizer,
            max_length=self.max_length,
            max_bad_share=self.max_bad_share,
            num_proc=self.num_proc,
        )
        if self.further is not None:
            dataset = self.further(dataset, name)
        optional = [column for column in self.optional if column in dataset.column_names]
        return dataset.select_columns([*IDS, "row", *self.columns, *optional])


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
    """The other way round: a float32 column whose rows have these lengths."""
    import pyarrow as pa

    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(values, pa.float32()))


def numbered_pairs(dataset, tokenizer, *, max_length: int | None, max_bad_share: float, num_proc: int | None = None):
    """The output of `tokenize_pairs`. A dataset that is tokenised already is taken as it is, if no completion is empty
    and its numbers are usable; its rows are numbered where they have no column `row`."""
    if not set(IDS) <= columns_of(dataset):
        return tokenize_pairs(dataset, tokenizer, max_length=max_length, max_bad_share=max_bad_share, num_proc=num_proc)
    for column in IDS:
        empty = np.flatnonzero(flat_column(dataset, column)[0] == 0)
        if len(empty):
            raise DataError(f"{len(empty)} tokenised pairs have an empty {column}: rows {empty[:10].tolist()}")
    _check_numbers(dataset)
    return dataset if "row" in dataset.column_names else dataset.add_column("row", np.arange(len(dataset)))


def _check_numbers(dataset) -> None:
    names = [name for name in NUMBERS if name in dataset.column_names]
    for index, row in enumerate(dataset.select_columns(names) if names else ()):
        try:
            check_pair_numbers(row)
        except BadRow as reason:
            raise DataError(f"tokenised pairs, row {index}: {reason}") from reason
