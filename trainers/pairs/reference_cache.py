"""Reference log-probs computed once for a whole dataset and kept on disk.

They are kept per token, so every loss that works with a live reference works with the cache.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, concatenate_datasets
from torch import nn

from align.data.limits import lengths_of, parts_of
from align.data.tokenized import IDS, MASKS
from align.distributed.ranks import shared
from align.modeling.fingerprint import fingerprint
from align.modeling.logprobs import language_model
from align.trainers.pairs.data import trained_lengths
from align.trainers.pairs.reference_file import check, share, write
from align.trainers.pairs.reference_shards import Logps, ReferenceShards

logger = logging.getLogger(__name__)

ROWS_AT_ONCE = 2048


def weights_mark(model: nn.Module, *, frozen_only: bool) -> str:
    """A digest of a model's weights and configuration; frozen_only: an adapter is switched off, and does not count."""
    state = model.state_dict(keep_vars=True)
    weights = {name: value for name, value in state.items() if not (frozen_only and value.requires_grad)}
    return fingerprint({"weights": weights, "config": language_model(model).config})


def mark_of(dataset, weights: str, precision: str) -> str:
    """A digest of all that reference log-probs follow from: the token ids of the pairs (and so the tokenizer), the
    reference's weights (their mark), and the precision it runs in."""
    digest = hashlib.blake2b(f"{weights} {precision}".encode(), digest_size=8)
    for column in (*IDS, *(name for name in MASKS if name in dataset.column_names)):
        digest.update(lengths_of(dataset, column).data)
        for _, values in parts_of(dataset, column):
            digest.update(values.flatten().to_numpy().data)
    return digest.hexdigest()


class ReferenceCache:
    """The reference's log-probs of whole datasets, in a folder that runs may share.

    Args:
        weights: of the reference, their `weights_mark`.
        precision: a description of what it computes in.

    marks: of the datasets that were passed to `add_to`, by name.
    """

    def __init__(self, folder: str | Path, weights: str, precision: str):
        self.folder = Path(folder)
        self.weights = weights
        self.precision = precision
        self.marks: dict[str, str] = {}

    def add_to(self, dataset, name: str, compute: Callable[[ReferenceShards], None]):
        """The dataset with the columns `COLUMNS`: per row the float32 log-probs of its completions' tokens, which all
        processes map from `folder/<name>-<mark>.arrow`.

        If there is no such file, every process calls `compute`, which appends what is missing to the shards in
        `folder/<name>-<mark>.shards`, and the main one writes the file of them and removes them.
        """
        mark = self.marks[name] = mark_of(dataset, self.weights, self.precision)
        path, main = self.folder / f"{name}-{mark}.arrow", PartialState().is_main_process
        if PartialState().is_local_main_process and path.exists():  # nodes may have disks of their own
            check(path, [trained_lengths(dataset, ids) for ids in IDS[1:]])
        if shared(path.exists()):
            if main:
                logger.info("reference log-probs are read from %s", path)
        else:
            if main:
                self._warn_of_others(name)
            shards = ReferenceShards(path.with_suffix(".shards"), PartialState().process_index, len(dataset))
            compute(shards)
            batches = _of_all(shards, len(dataset))
            if main:
                write(path, batches)
            else:
                for _ in batches:  # it sends the main process what this one has
                    pass
            shards.remove()
        share(path)
        return concatenate_datasets([dataset, Dataset.from_file(str(path))], axis=1)

    def _warn_of_others(self, name: str) -> None:
        others = sorted(other.name for other in self.folder.glob(f"{name}-*.arrow"))
        if others:
            logger.warning(
                "%s has reference log-probs of other data or of another reference (%s): these are computed anew",
                self.folder,
                ", ".join(others),
            )


def _of_all(shards: ReferenceShards, rows: int) -> Iterator[list[Logps]]:
    """The log-probs of the rows in their order, some at a time, from the shards of all processes, which all must go
    through it."""
    for first in range(0, rows, ROWS_AT_ONCE):
        end = min(first + ROWS_AT_ONCE, rows)
        found = {row: logps for part in gather_object([shards.read(first, end)]) for row, logps in part.items()}
        yield [found[row] for row in range(first, end)]
