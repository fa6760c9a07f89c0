"""Tokenised rows on disk: made once, by one process of a machine, and memory-mapped by all.

A set lies in `<cache of datasets>/align_tokenised/<key>/`: Arrow files, and `made.json` with their checksums and with
what was found in the rows. The key is a digest of all that the set follows from (`align.data.fingerprint`), so nothing
in there is ever out of date, and any of it may be deleted at any time.
"""

import errno
import fcntl
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from align.data.bad_rows import BadRows
from align.data.fingerprint import file_digest
from align.distributed.disk import no_room, umask
from align.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

FOLDER = "align_tokenised"
MADE = "made.json"
PATIENCE = 600.0
"""Seconds that one process waits for another that makes a set and writes nothing."""

CACHE_ELSEWHERE = "Set HF_DATASETS_CACHE to a folder with room"
TMP_ELSEWHERE = "Set TMPDIR to a folder with room"
WITHOUT_CACHE = "call datasets.disable_caching() to keep them for this run only"

Make = Callable[[Path, BadRows], "Dataset"]


def root() -> Path:
    """Where the sets lie: beside what `datasets` keeps (HF_DATASETS_CACHE, HF_HOME)."""
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE).expanduser() / FOLDER


@contextmanager
def room_in(folder: Path | None, what: str, advice: str = CACHE_ELSEWHERE):
    """`DataError` where the disk of `folder` is full: `datasets` says then that the data cannot be read, or speaks of a
    closed file. None: the cache of `datasets`."""
    try:
        yield
    except Exception as error:
        if not no_room(error):
            raise
        where, said = folder or root().parent, os.strerror(errno.ENOSPC)
        raise DataError(f"{what} cannot be written in {where}: {said}. {advice}") from error


def cached(key: str, make: Make, report: BadRows) -> "Dataset":
    """The set of this key, memory-mapped; `report` gets what was found when it was made.

    make(folder, report): writes Arrow files into the folder and returns them as a dataset. Called on one process; the
    others that ask for the same set wait until it is there, or go on themselves if that process dies. A set that is not
    what was written is made again.
    """
    folder = root() / key
    dataset = _read(folder, report)
    if dataset is not None:
        return dataset
    try:
        with room_in(folder.parent, "tokenised rows", f"{CACHE_ELSEWHERE}, or {WITHOUT_CACHE}"):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _turn(folder):
                dataset = _read(folder, report)  # another process may just have made it
                if dataset is None:
                    _make(folder, make, report)
                    dataset = _read(folder, report)
    except OSError as error:
        raise DataError(
            f"tokenised rows cannot be written in {folder.parent}: {error.strerror or error}. {CACHE_ELSEWHERE}, or "
            f"{WITHOUT_CACHE}"
        ) from error
    if dataset is None:
        raise DataError(f"{folder} does not hold what was just written there: look at the disk")
    return dataset


def _read(folder: Path, report: BadRows) -> "Dataset | None":
    """None where there is no set, or a damaged one."""
    from datasets import Dataset, concatenate_datasets

    if not (folder / MADE).is_file():
        return None
    try:
        made = json.loads((folder / MADE).read_text(encoding="utf-8"))
        files, reasons, notes = made["files"], made["reasons"], made["notes"]
        whole = bool(files) and all(file_digest(folder / name) == digest for name, digest in files.items())
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        return None
    report.reasons, report.notes = reasons, notes
    logger.info("tokenised rows are read from %s", folder)
    return concatenate_datasets([Dataset.from_file(str(folder / name)) for name in files])


def _make(folder: Path, make: Make, report: BadRows) -> None:
    for left_over in folder.parent.glob(f".{folder.name}-*"):  # of a process that was killed: we hold the lock
        shutil.rmtree(left_over)
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        dataset = make(unfinished, report)
        files = [Path(entry["filename"]) for entry in dataset.cache_files]
        made = {
            "files": {file.name: file_digest(file) for file in files},
            "reasons": report.reasons,
            "notes": report.notes,
        }
        (unfinished / MADE).write_text(json.dumps(made), encoding="utf-8")
        os.chmod(unfinished, 0o777 & ~umask())  # others may use the cache too
        if folder.exists():
            logger.warning("the tokenised rows in %s were damaged: they are made again", folder)
            shutil.rmtree(folder)
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def _turn(folder: Path):
    """One process at a time makes a set. The system frees the lock when its holder ends; DataError if the holder lives
    and has written nothing for `PATIENCE` seconds."""
    with folder.with_suffix(".lock").open("a") as file:
        seen, since, told = -1, time.monotonic(), False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                written = _written(folder)
            if written != seen:
                seen, since = written, time.monotonic()
            if time.monotonic() - since > PATIENCE:
                raise DataError(
                    f"another process is to write tokenised rows to {folder} and has written nothing for "
                    f"{PATIENCE:.0f} s: end it, then start again"
                )
            if not told:
                logger.info("another process tokenises these rows: waiting for %s", folder)
                told = True
            time.sleep(0.2)
        yield


def _written(folder: Path) -> int:
    """Bytes of the unfinished set."""
    total = 0
    for file in folder.parent.glob(f".{folder.name}-*/*"):
        try:
            total += file.stat().st_size
        except FileNotFoundError:  # finished meanwhile
            continue
    return total
