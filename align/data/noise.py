"""Label noise in preference pairs: a fixed, seeded set of rows, the same for everyone who trains on them."""

import json
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from align.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

FILE_NAME = "flipped_labels.json"
SWAPPED = (("chosen", "rejected"), ("chosen_ids", "rejected_ids"), ("chosen_mask", "rejected_mask"))


def flip_labels(dataset: "Dataset", share: float, seed: int) -> tuple["Dataset", list[int]]:
    """Swap chosen and rejected in `round(share * rows)` rows drawn without replacement; returns the rows, ascending.

    Works before and after tokenisation. Row numbers count from 0 in `dataset`. Exactly this many labels are wrong: a
    share of 0.25 is what "randomising half of the labels" gives in expectation. Other columns stay as they are.
    """
    pairs = [pair for pair in SWAPPED if set(pair) <= set(dataset.column_names)]
    if not pairs:
        raise DataError(f"no preference pairs to flip: the columns are {', '.join(dataset.column_names)}")
    rows = flipped_rows(len(dataset), share, seed)
    flipped = np.zeros(len(dataset), dtype=bool)
    flipped[rows] = True

    def swap(batch: dict, indices: list[int]) -> dict:
        new = {}
        for a, b in pairs:
            columns = zip(batch[a], batch[b], flipped[indices], strict=True)
            new[a], new[b] = zip(*((y, x) if flip else (x, y) for x, y, flip in columns), strict=True)
        return {name: list(values) for name, values in new.items()}

    noisy = dataset.with_format(None).map(
        swap,
        batched=True,
        with_indices=True,
        features=dataset.features,
        keep_in_memory=True,
        load_from_cache_file=False,
        new_fingerprint=uuid.uuid4().hex,
        desc="Flipping labels",
    )
    return noisy, rows


def flipped_rows(count: int, share: float, seed: int) -> list[int]:
    """The rows of `count` that `flip_labels` flips, ascending."""
    if not 0 <= share <= 1:
        raise DataError(f"the share of flipped labels must be in [0, 1], got {share}")
    return np.sort(np.random.default_rng(seed).permutation(count)[: round(share * count)]).tolist()


def save_flips(path: str | Path, rows: list[int], *, share: float, seed: int) -> None:
    """Write the flipped rows with the share and the seed that drew them, as JSON."""
    Path(path).write_text(json.dumps({"share": share, "seed": seed, "rows": rows}) + "\n")
