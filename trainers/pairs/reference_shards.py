"""Reference log-probs while they are computed: each process appends its rows to a file of its own, so that what a
killed run had done is not done again, by itself or by another run on the same folder."""

import os
import shutil
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from align.distributed.disk import writing

HEAD, CHECK = struct.Struct("<qII"), struct.Struct("<I")  # row, tokens of chosen, of rejected; crc32 of what precedes
Logps = tuple[np.ndarray, np.ndarray]


class ReferenceShards:
    """A folder of shards: of runs that are over, and of those that write now. A record is one row: `HEAD`, the float32
    log-probs of the chosen and of the rejected answer, `CHECK`. A record that is not whole ends its shard: the process
    was killed there, and the rows from there on are computed again.

    rank: of this process, in the name of its shard.
    """

    def __init__(self, folder: Path, rank: int):
        self.folder, self.rank = folder, rank
        self._file: BinaryIO | None = None

    def read(self) -> dict[int, Logps]:
        """What there is by row; the files are mapped into memory."""
        found: dict[int, Logps] = {}
        for path in sorted(self.folder.glob("*.shard")):
            if path.stat().st_size:
                _read_shard(np.memmap(path, np.uint8, mode="r"), found)
        return found

    def append(self, row: int, chosen: np.ndarray, rejected: np.ndarray) -> None:
        record = HEAD.pack(row, len(chosen), len(rejected)) + chosen.tobytes() + rejected.tobytes()
        with writing(self.folder):
            if self._file is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                # a name of its own, and no buffer: what is written outlives the process
                self._file = (self.folder / f"{self.rank}-{os.urandom(6).hex()}.shard").open("xb", buffering=0)
            self._file.write(record + CHECK.pack(zlib.crc32(record)))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def remove(self) -> None:
        """Of all runs, once the rows are in one file; others that are still computing go on for themselves."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _read_shard(data: np.ndarray, found: dict[int, Logps]) -> None:
    start = 0
    while start + HEAD.size + CHECK.size <= len(data):
        row, chosen, rejected = HEAD.unpack(data[start : start + HEAD.size].tobytes())
        end = start + HEAD.size + 4 * (chosen + rejected)
        if end + CHECK.size > len(data):
            return
        record = data[start : end + CHECK.size].tobytes()  # a record begins at no multiple of four
        if CHECK.pack(zlib.crc32(record[: -CHECK.size])) != record[-CHECK.size :]:
            return
        values = np.frombuffer(record[HEAD.size : -CHECK.size], np.float32)
        found.setdefault(row, (values[:chosen], values[chosen:]))
        start = end + CHECK.size
