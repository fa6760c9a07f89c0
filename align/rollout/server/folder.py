"""The folder through which the weights of a run go to its servers, and what runs that were killed have left behind."""

import fcntl
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import IO

from align.errors import ConfigError
from align.rollout.server.options import MEMORY

PREFIX = "align_weights_"
ALIVE = "alive"  # a file that the run keeps locked: the lock goes with its process, however that ends
_kept: dict[str, IO] = {}  # the locked file of each folder of this process


def new_folder(base: Path) -> str:
    """A folder for the weights of one run."""
    if str(base) == MEMORY:
        remove_left(base)
    try:
        folder = tempfile.mkdtemp(prefix=PREFIX, dir=base)
        file = open(Path(folder) / "made", "w")  # noqa: SIM115
    except OSError as error:
        raise ConfigError(
            f"transfer_folder: {base} is not a folder that can be written to ({error.strerror})", key="transfer_folder"
        ) from error
    with suppress(OSError):  # a file system without locks, where nobody looks for them
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (Path(folder) / "made").rename(Path(folder) / ALIVE)  # only now: a run that starts finds it locked
    _kept[folder] = file
    return folder


def remove_folder(folder: str) -> None:
    shutil.rmtree(folder)
    if (file := _kept.pop(folder, None)) is not None:
        file.close()


def remove_left(base: Path) -> None:
    """Folders of runs that were killed: in memory, a 7B model's weights are 15 GB that nobody gives back. Only there:
    of a folder that machines share, the locks of another one may not be seen."""
    for file in base.glob(f"{PREFIX}*/{ALIVE}"):
        with suppress(OSError), open(file) as opened:  # another user's, or one that is just being removed
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(file.parent)
