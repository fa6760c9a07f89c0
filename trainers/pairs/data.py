"""Tokenised pairs as the preference trainers take them."""

import numpy as np

from align.data.tokenize import tokenize_pairs
from align.errors import DataError

IDS = ("prompt_ids", "chosen_ids", "rejected_ids")


def flat_column(dataset, column: str) -> tuple[np.ndarray, np.ndarray]:
    """(lengths [rows], values) of a column of lists: all values, row after row."""
    import pyarrow.compute as pc

    values = dataset.select_columns([column]).with_format("arrow")[:][column].combine_chunks()
    return pc.list_value_length(values).to_numpy().astype(np.int64), values.flatten().to_numpy()


def list_column(values: np.ndarray, lengths: np.ndarray):
    """The other way round: a float32 column whose rows have these lengths."""
    import pyarrow as pa

    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(values, pa.float32()))


def numbered_pairs(dataset, tokenizer, *, max_length: int | None, max_bad_share: float):
    """The output of `tokenize_pairs`. A dataset that is tokenised already is taken as it is, if no completion is empty;
    its rows are numbered where they have no column `row`."""
    if not set(IDS) <= set(dataset.column_names):
        return tokenize_pairs(dataset, tokenizer, max_length=max_length, max_bad_share=max_bad_share)
    for column in IDS:
        empty = np.flatnonzero(flat_column(dataset, column)[0] == 0)
        if len(empty):
            raise DataError(f"{len(empty)} tokenised pairs have an empty {column}: rows {empty[:10].tolist()}")
    return dataset if "row" in dataset.column_names else dataset.add_column("row", np.arange(len(dataset)))
