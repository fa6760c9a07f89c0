"""One run at a time in an output folder."""

import fcntl
import os
import socket
from contextlib import contextmanager
from pathlib import Path

from align.errors import TrainingError

FILE_NAME = ".align_lock"


@contextmanager
def holding(folder: str | Path):
    """Hold the folder's lock, which names its holder; the system frees it when the process ends. `TrainingError` if
    another run holds it, or if nothing can be written there."""
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
        yield
