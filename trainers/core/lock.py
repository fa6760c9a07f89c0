"""One run at a time in an output folder, and no results of an earlier one."""

import fcntl
import os
import socket
from contextlib import contextmanager
from pathlib import Path

from align.errors import TrainingError
from align.evaluation import completions_file, masks, records
from align.trainers.weighting import search

FILE_NAME = ".align_lock"
RESULTS = (records.FILE_NAME, completions_file.FILE_NAME, masks.FILE_NAME, masks.PAGE, search.FILE_NAME)
"""What some runs write and others do not: reports, `align watch` and model cards take it for the folder's run."""


@contextmanager
def holding(folder: str | Path, *, anew: bool = False):
    """Hold the folder's lock, which names its holder; the system frees it when the process ends. `TrainingError` if
    another run holds it, or if nothing can be written there. anew: a run begins, and what an earlier one has left is
    kept under other names."""
    path = Path(folder) / FILE_NAME
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise TrainingError(f"nothing can be written in output_dir {folder}: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise TrainingError(
                f"another run trains in {folder} ({file.read().strip()}): use another output_dir, or wait for it"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        if anew:
            _set_aside(Path(folder))
        yield


def _set_aside(folder: Path) -> None:
    for name in RESULTS:
        if (folder / name).exists():
            records.set_aside(folder / name)
