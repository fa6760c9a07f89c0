"""What tokenised demonstrations say of the tokens that are trained: masks, or labels as transformers has them."""

from typing import TYPE_CHECKING, Any

import numpy as np

from align.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

MASKS = ("completion_mask", "assistant_masks")
LABELS = "labels"
IGNORED = -100  # the label that torch.nn.functional.cross_entropy leaves out
AGREE = f"is 0 where labels is not {IGNORED}, and with labels no mask is looked at: leave one of the two columns out"


def check_labels(dataset: "Dataset") -> None:
    """DataError for rows whose masks or labels are not one for each of `input_ids`, or disagree: what trains them would
    take the shorter of two lists, read a 2 as a 0, and leave a mask beside labels aside."""
    import pyarrow.compute as pc

    from align.data.limits import parts_of

    names = [name for name in (*MASKS, LABELS) if name in dataset.column_names]
    for (start, ids), *others in zip(*(parts_of(dataset, n) for n in ("input_ids", *names)), strict=True):
        counts = pc.list_value_length(ids).fill_null(0).to_numpy()
        found = {}
        for name, (_, lists) in zip(names, others, strict=True):
            own = pc.list_value_length(lists).fill_null(0).to_numpy()
            _raise_for(name, "must have one for each of input_ids", start + np.flatnonzero(own != counts))
            found[name] = lists.flatten().cast("float64").to_numpy(zero_copy_only=False)  # what is missing becomes NaN
        rows = start + np.repeat(np.arange(len(ids)), counts)
        for name in names:
            _raise_for(name, _rule(name), np.unique(rows[~_allowed(name, found[name])]))
        if LABELS in found:
            firsts = np.r_[True, rows[1:] != rows[:-1]] if len(rows) else np.zeros(0, bool)
            for name in (name for name in names if name != LABELS):
                trained = (found[name] == 0) & (found[LABELS] != IGNORED) & ~firsts
                _raise_for(name, AGREE, np.unique(rows[trained]))


def label_problem(row: dict[str, Any]) -> str | None:
    """The same of one row of a stream: what is wrong with it."""
    ids, labels = row["input_ids"], row.get(LABELS)
    for name in (name for name in (*MASKS, LABELS) if name in row):
        values = row[name]
        if values is None or len(values) != len(ids):
            return f"{name} must have one for each of input_ids"
        if not _allowed(name, np.array(values, dtype=np.float64)).all():
            return f"{name} {_rule(name)}"
        if labels is not None and name != LABELS:
            if any(not kept and label != IGNORED for kept, label in list(zip(values, labels, strict=True))[1:]):
                return f"{name} {AGREE}"
    return None


def _allowed(name: str, values: np.ndarray) -> np.ndarray:
    return (values >= 0) | (values == IGNORED) if name == LABELS else np.isin(values, (0, 1))


def _rule(name: str) -> str:
    return f"must hold tokens, and {IGNORED} for what is not trained" if name == LABELS else "must hold 0 or 1"


def _raise_for(name: str, problem: str, rows: np.ndarray) -> None:
    if len(rows):
        raise DataError(f"{len(rows)} tokenised rows: {name} {problem}: rows {rows[:10].tolist()}")
