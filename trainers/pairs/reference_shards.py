"""Reference log-probs while they are computed: each process appends its rows to a file of its own, so that what a
killed run had done is not done again, by itself or by another run on the same folder."""

import errno
import os
import shutil
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from align.distributed.disk import writing

HEAD, CHECK = struct.Struct("<qII"), struct.Struct("<I")  # row, tokens of chosen, of rejected; crc32 of what precedes
Logps = tuple[np.ndarray, np.ndarray]


class ReferenceShards:
    """A folder of shards: of runs that are over, and of those that write now. A record is one row: `HEAD`, the float32
    log-probs of the chosen and of the rejected answer, `CHECK`. A record that is not whole ends its shard: the process
    was killed there, and the rows from there on are computed again.

    In memory there is where each row stands. The files are mapped, and stay readable when another run removes them.

    rank: of this process, in the name of its shard. rows: of the dataset.
    """

    def __init__(self, folder: Path, rank: int, rows: int):
        self.folder, self.rank = folder, rank
        self._shards: list[np.ndarray] = []
        self._shard, self._start = np.full(rows, -1, np.int32), np.zeros(rows, np.int64)
        self._file: IO[bytes] | None = None

    def find(self) -> np.ndarray:
        """Look at all shards that there are. [rows], bool: which rows are in one."""
        for path in sorted(self.folder.glob("*.shard")):
            try:
                data = np.memmap(path, np.uint8, mode="r")
            except (FileNotFoundError, ValueError):  # another run has removed it, or it is empty
                continue
            for row, start in _records(data):
                if row < len(self._shard) and self._shard[row] < 0:
                    self._shard[row], self._start[row] = len(self._shards), start
            self._shards.append(data)
        return self._shard >= 0

    def append(self, row: int, chosen: np.ndarray, rejected: np.ndarray) -> None:
        record = HEAD.pack(row, len(chosen), len(rejected)) + chosen.tobytes() + rejected.tobytes()
        with writing(self.folder):
            if self._file is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                # a name of its own, and no buffer: what is written outlives the process
                self._file = (self.folder / f"{self.rank}-{os.urandom(6).hex()}.shard").open("x+b", buffering=0)
            self._shard[row], self._start[row] = len(self._shards), self._file.tell()
            record += CHECK.pack(zlib.crc32(record))
            if self._file.write(record) < len(record):  # the last bytes that there was room for, without an error
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        """The rows that were appended can be read now."""
        if self._file is not None:
            self._shards.append(np.memmap(self._file, np.uint8, mode="r"))
            self._file.close()
            self._file = None

    def read(self, first: int, end: int) -> dict[int, Logps]:
        """Those of the rows from `first` to before `end` that this process found or appended."""
        found: dict[int, Logps] = {}
        for row in first + np.flatnonzero(self._shard[first:end] >= 0):
            data, start = self._shards[self._shard[row]], int(self._start[row])
            _, chosen, rejected = HEAD.unpack(data[start : start + HEAD.size].tobytes())
            start += HEAD.size  # a record begins at no multiple of four
            values = np.frombuffer(data[start : start + 4 * (chosen + rejected)].tobytes(), np.float32)
            found[int(row)] = values[:chosen], values[chosen:]
        return found

    def remove(self) -> None:
        """Of all runs, once the rows are in one file; others that are still computing go on for themselves."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _records(data: np.ndarray) -> Iterator[tuple[int, int]]:
    """Row and first byte of the whole records of a shard, up to one that is not."""
    start = 0
    while start + HEAD.size + CHECK.size <= len(data):
        row, chosen, rejected = HEAD.unpack(data[start : start + HEAD.size].tobytes())
        end = start + HEAD.size + 4 * (chosen + rejected)
        if end + CHECK.size > len(data):
            return
        if CHECK.pack(zlib.crc32(data[start:end].data)) != data[end : end + CHECK.size].tobytes():
            return
        yield row, start
        start = end + CHECK.size
