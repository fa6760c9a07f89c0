"""Reference log-probs computed once for a whole dataset and kept on disk.

They are kept per token, so every loss that works with a live reference works with the cache.
"""

import hashlib
import logging
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import nn

from align.data.tokenized import IDS, MASKS
from align.distributed.disk import writing
from align.errors import TrainingError
from align.modeling.fingerprint import fingerprint
from align.modeling.logprobs import language_model
from align.trainers.pairs.data import flat_column, list_column, trained_lengths
from align.trainers.pairs.reference_shards import ReferenceShards

logger = logging.getLogger(__name__)

COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


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
        for values in flat_column(dataset, column):
            digest.update(values.data)
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

    def add_to(self, dataset, name: str, compute: Callable[[ReferenceShards], tuple[np.ndarray, np.ndarray]]):
        """The dataset with the columns `COLUMNS`: per row the float32 log-probs of its completions' tokens.

        The main process reads them from `folder/<name>-<mark>.npz`. If there is no such file, every process calls
        `compute` (all tokens of chosen and of rejected, row after row), which reads and appends to the shards in
        `folder/<name>-<mark>.shards`, and the main one writes the file and removes the shards.
        """
        mark = self.marks[name] = mark_of(dataset, self.weights, self.precision)
        path, main = self.folder / f"{name}-{mark}.npz", PartialState().is_main_process
        flat = broadcast_object_list([_read(path) if main else None])[0]
        if flat is None:
            if main:
                self._warn_of_others(name)
            shards = ReferenceShards(path.with_suffix(".shards"), PartialState().process_index)
            flat = compute(shards)
            if main:
                _write(path, flat)
                shards.remove()
        for column, ids, values in zip(COLUMNS, IDS[1:], flat, strict=True):
            lengths = trained_lengths(dataset, ids)
            if len(values) != lengths.sum():
                raise TrainingError(f"{path} holds {len(values)} log-probs for {lengths.sum()} tokens: delete it")
            dataset = dataset.add_column(column, list_column(values, lengths))
        return dataset

    def _warn_of_others(self, name: str) -> None:
        others = sorted(other.name for other in self.folder.glob(f"{name}-*.npz"))
        if others:
            logger.warning(
                "%s has reference log-probs of other data or of another reference (%s): these are computed anew",
                self.folder,
                ", ".join(others),
            )


def _read(path: Path) -> tuple[np.ndarray, np.ndarray] | None:
    if not path.exists():
        return None
    logger.info("reference log-probs are read from %s", path)
    try:
        with np.load(path) as stored:
            return stored["chosen"], stored["rejected"]
    # what numpy and zipfile let out of damaged files: RuntimeError of a flipped bit that says it is encrypted, say
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise TrainingError(f"{path} is damaged ({error}): delete it, and the log-probs are computed again") from error


def _write(path: Path, flat: tuple[np.ndarray, np.ndarray]) -> None:
    """Under a name of its own until it is whole: other runs may write the same file at the same time."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_whole(path, flat)


def _write_whole(path: Path, flat: tuple[np.ndarray, np.ndarray]) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".unfinished-", suffix=".npz", delete=False) as file:
        try:
            np.savez(file, chosen=flat[0], rejected=flat[1])
        except BaseException:
            os.unlink(file.name)
            raise
    os.chmod(file.name, 0o666 & ~_umask())
    os.replace(file.name, path)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
