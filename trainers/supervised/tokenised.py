"""Demonstrations that are tokenised already: taken as they are, once they are checked and cut."""

from functools import partial

from align.data.bad_rows import BadRow
from align.data.checks import SCORE, check_score
from align.data.collate import TOKENS, cut_rows, untrained_rows
from align.data.formats import check_tokens, columns_of
from align.data.labels import IGNORED, MASKS, check_labels, label_problem
from align.data.limits import longest_of
from align.data.streams import is_stream, mapped
from align.errors import DataError


def tokenised_rows(dataset, *, limit: int | None, cut: bool, scored: bool):
    """The rows as TRL's trainer takes them, a stream lazily. DataError for one without a trained token, which TRL would
    drop without a word, and where masks or labels do not fit the tokens. limit: of a row's tokens; cut: rows that are
    longer are cut here. scored: a column `score` is of rewards."""
    columns = columns_of(dataset, streams=True)
    check_tokens(dataset, [name for name in TOKENS if name in columns])
    if scored and SCORE in columns:
        dataset = _with_checked_scores(dataset)
    if is_stream(dataset):
        dataset = mapped(dataset, _labelled)
        if limit is not None and cut:
            dataset = mapped(dataset, partial(_cut, limit))
        return mapped(dataset, partial(_trained, limit))
    check_labels(dataset)
    if limit is not None and cut and longest_of(dataset, "input_ids") > limit:
        dataset = cut_rows(dataset, limit)
    empty = untrained_rows(dataset, limit)
    if len(empty):
        raise DataError(f"{len(empty)} tokenised rows train no token: rows {empty[:10].tolist()}")
    return dataset


def _with_checked_scores(dataset):
    """Tokenised rows; DataError where a `score` is none."""
    if is_stream(dataset):
        return mapped(dataset, _scored)
    for number, score in enumerate(dataset[SCORE][:]):  # a column without [:] is read row by row
        _scored({SCORE: score}, number)
    return dataset


def _scored(row: dict, number: int) -> dict:
    try:
        check_score(row)
    except BadRow as problem:
        raise DataError(f"row {number} of the tokenised rows: {problem}, got {row[SCORE]!r}") from None
    return row


def _labelled(row: dict, number: int) -> dict:
    problem = label_problem(row)
    if problem is not None:
        raise DataError(f"row {number} of the tokenised stream: {problem}")
    return row


def trains(row: dict, limit: int | None) -> bool:
    """Whether a tokenised row has a trained token among its first `limit`; the first token is predicted by none."""
    if any(row.get(name) is not None and not any(row[name][1:limit]) for name in MASKS):
        return False
    return row.get("labels") is None or any(label != IGNORED for label in row["labels"][1:limit])


def _cut(limit: int, row: dict, number: int | None = None) -> dict:
    return row | {name: row[name][:limit] for name in TOKENS if row.get(name) is not None}


def _trained(limit: int | None, row: dict, number: int) -> dict:
    if not trains(row, limit):
        raise DataError(f"row {number} of the tokenised stream trains no token")
    return row
