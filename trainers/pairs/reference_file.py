"""Reference log-probs of a whole dataset in one Arrow file, which every process maps into memory.

A batch of rows is written with the checksum of its bytes, so that a flipped bit is seen as well as a file that is cut.
"""

import os
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
from accelerate import PartialState
from accelerate.utils import gather_object

from align.distributed.disk import writing
from align.distributed.ranks import shared
from align.errors import TrainingError
from align.trainers.pairs.reference_shards import Logps

COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
_SCHEMA = pa.schema([(column, pa.large_list(pa.float32())) for column in COLUMNS])
SENT = 2**25
"""Bytes of a file that are sent at a time."""


def write(path: Path, batches: Iterable[Sequence[Logps]]) -> None:
    """The rows, batch after batch. Under a name of its own until the file is whole: other runs may write the same one
    at the same time."""
    with _replacing(path) as file, pa.ipc.new_stream(file, _SCHEMA) as writer:
        for rows in batches:
            columns = [_column([row[side] for row in rows]) for side in range(len(COLUMNS))]
            batch = pa.RecordBatch.from_arrays(columns, schema=_SCHEMA)
            writer.write_batch(batch, custom_metadata={"crc32": str(_checksum(batch))})


def check(path: Path, lengths: Sequence[np.ndarray]) -> None:
    """Raises `TrainingError` for a file that is damaged, or whose rows have not these lengths, [rows] for each of
    `COLUMNS`."""
    first = 0
    try:
        with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as reader:
            if reader.schema != _SCHEMA:
                raise ValueError("it has other columns")
            while True:
                try:
                    batch, metadata = reader.read_next_batch_with_custom_metadata()
                except StopIteration:
                    break
                if metadata is None or metadata.get("crc32") != str(_checksum(batch)).encode():
                    raise ValueError(f"the checksum of the rows from {first} on is wrong")
                if any(array.null_count for column in batch.columns for array in (column, column.values)):
                    raise ValueError(f"some of the rows from {first} on are missing")
                for column, expected in zip(batch.columns, lengths, strict=True):
                    found = np.diff(column.offsets.to_numpy())
                    if not np.array_equal(found, expected[first : first + len(found)]):
                        raise ValueError(f"the rows from {first} on have other lengths than the data's")
                first += len(batch)
        if first != len(lengths[0]):
            raise ValueError(f"it has {first} rows for {len(lengths[0])} pairs")
    # pa.ArrowInvalid is a ValueError, and what it allocates for a damaged length a MemoryError
    except (OSError, ValueError, KeyError, MemoryError, pa.ArrowException) as error:
        said = "".join(c if c.isprintable() else " " for c in str(error))
        raise TrainingError(f"{path} is damaged ({said}): delete it, and the log-probs are computed again") from error


def share(path: Path) -> None:
    """Give the main process's file to those that do not see it, on other disks. All processes call it together."""
    missing = gather_object([not path.exists()])
    if not any(missing):
        return
    state = PartialState()
    size = shared(path.stat().st_size if state.is_main_process else None)
    with _replacing(path) if missing[state.process_index] else open(os.devnull, "wb") as target:
        for start in range(0, size, SENT):
            piece = None
            if state.is_main_process:
                with path.open("rb") as file:
                    file.seek(start)
                    piece = file.read(SENT)
            target.write(shared(piece))


def _column(values: list[np.ndarray]) -> pa.LargeListArray:
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in values], dtype=np.int64)])
    flat = np.concatenate(values).astype(np.float32, copy=False) if values else np.zeros(0, np.float32)
    return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(flat, pa.float32()))


def _checksum(batch: pa.RecordBatch) -> int:
    value = 0
    for column in batch.columns:
        for array in (column.offsets, column.values):
            value = zlib.crc32(np.ascontiguousarray(array.to_numpy()).data, value)
    return value


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes its name when it is whole, and leaves nothing behind if that fails."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".unfinished-") as folder:
            whole = Path(folder) / path.name
            with whole.open("wb") as file:
                yield file
            os.replace(whole, path)
