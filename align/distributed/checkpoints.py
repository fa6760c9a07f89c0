"""Checkpoints that are whole or not there.

transformers writes a `checkpoint-<step>` folder file by file, so a killed job leaves a folder that looks like a
checkpoint. A manifest (name, size and CRC-32 of every file) is written to a temporary name and renamed as the very
last act: a folder without it, or that does not match it, is not a checkpoint. This works for every back-end (FSDP and
DeepSpeed write their shards themselves), which renaming the whole folder does not.

The system writes files to the disk when it likes, up to minutes later. A power loss may cost a checkpoint of which
older ones are left; before one is deleted, the new one is flushed to the disk.
"""

import errno
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

logger = logging.getLogger(__name__)

MANIFEST = "align_manifest.json"


def file_crc32(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            crc = zlib.crc32(chunk, crc)
    return crc


def flush(path: Path) -> None:
    """Return when a file, or the names in a folder, are on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:  # some file systems cannot, for folders or for anything
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(opened)


def flush_files(folder: str | Path) -> None:
    """Return when the files of a folder, not those in folders below it, are on the disk, with their names."""
    for path in (*Path(folder).iterdir(), Path(folder)):
        if (path.is_file() or path == Path(folder)) and os.access(path, os.R_OK):
            flush(path)


def flush_tree(folder: str | Path) -> None:
    """The same for all below a folder, with their names."""
    for path in (*Path(folder).rglob("*"), Path(folder)):
        if (path.is_file() or path.is_dir()) and os.access(path, os.R_OK):
            with suppress(FileNotFoundError):  # of another process, which has removed it
                flush(path)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into that becomes `folder` when all of it is on the disk; of one that fails nothing is left.
    `folder` is not there, or empty."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        yield partial
        flush_tree(partial)
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
        flush(folder.absolute().parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def checksums(
    folder: str | Path, *, rank: int = 0, processes: int = 1, flushed: bool = False
) -> dict[str, dict[str, int]]:
    """Size and CRC-32 of this process's share of the files of `folder`, by relative name: the files by size, in turn,
    so that all processes read about as much. Call it when everything is written. flushed: the files are on the disk
    then."""
    folder = Path(folder)
    paths = [p for p in folder.rglob("*") if p.is_file() and p.name not in (MANIFEST, MANIFEST + ".tmp")]
    paths.sort(key=lambda path: (-path.stat().st_size, str(path)))
    paths = paths[rank::processes]
    found = {str(path.relative_to(folder)): {"size": path.stat().st_size, "crc32": file_crc32(path)} for path in paths}
    for path in paths if flushed else []:  # meanwhile the system has begun to
        flush(path)
    return found


def write_manifest(folder: str | Path, files: dict[str, dict[str, int]] | None = None) -> None:
    """Declare `folder` complete. Call once, after everything in it is written, on one process. files: the checksums of
    all processes; they are made here if left out."""
    folder = Path(folder)
    files = checksums(folder) if files is None else files
    temporary = folder / (MANIFEST + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump({"files": dict(sorted(files.items()))}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(folder / MANIFEST)


def damage(folder: str | Path) -> str | None:
    """What is wrong with a checkpoint, in words; None when it is whole."""
    folder = Path(folder)
    if not folder.is_dir():
        return "it is no folder"
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes().decode("utf-8"))
    except FileNotFoundError:
        return f"no {MANIFEST}: it was never finished"
    except (OSError, ValueError, RecursionError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    if not _lists_files(manifest):
        return f"{MANIFEST} does not list the files of a checkpoint with their sizes and checksums"
    for name, expected in manifest["files"].items():
        path = folder / name
        try:
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["size"]:
                return f"{name} has {path.stat().st_size} bytes instead of {expected['size']}"
            if file_crc32(path) != expected["crc32"]:
                return f"{name} does not match its checksum"
        except (OSError, ValueError) as error:  # the second: a name with a zero byte
            return f"{name!r} cannot be read: {error}"
    return None


def _lists_files(manifest) -> bool:
    files = manifest.get("files") if isinstance(manifest, dict) else None
    return (
        isinstance(files, dict)
        and bool(files)
        and all(
            isinstance(entry, dict) and isinstance(entry.get("size"), int) and isinstance(entry.get("crc32"), int)
            for entry in files.values()
        )
    )


def _by_step(output_dir: str | Path) -> dict[int, Path]:
    return {
        int(match.group(1)): path
        for path in Path(output_dir).glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }


def surplus(output_dir: str | Path, step: int, limit: int | None, best: str | None) -> list[Path]:
    """Checkpoints to delete, so that `limit` are left. step: of the one that was just written, which stays, as does
    `best`.

    Age is by steps, and not by times of files: a clock that is set back would make the new one the oldest. Those of
    later steps go first: an earlier run, or one that went on from here before, has left them.
    """
    folders = _by_step(output_dir)
    if not limit or limit < 1:
        return []
    kept = {folders[step].resolve()} | (set() if best is None else {Path(best).resolve()})
    by_age = sorted(folders, key=lambda other: (other <= step, other if other <= step else -other))
    others = [folders[other] for other in by_age if folders[other].resolve() not in kept]
    return others[: max(0, len(folders) - max(limit, len(kept)))]


def remove_older(output_dir: str | Path, step: int, limit: int | None, best: str | None) -> None:
    """Delete what `surplus` names. The files of the new checkpoint are on the disk (`checksums`); here their names get
    there first."""
    older = surplus(output_dir, step, limit, best)
    if older:
        new = _by_step(output_dir)[step]
        for folder in (*(path for path in new.rglob("*") if path.is_dir()), new, Path(output_dir)):
            flush(folder)
    for folder in older:
        shutil.rmtree(folder, ignore_errors=True)


def newest_whole(output_dir: str | Path) -> Path | None:
    """The newest undamaged checkpoint below `output_dir`; every damaged one that is passed over is warned about."""
    folders = _by_step(output_dir)
    for step in sorted(folders, reverse=True):
        problem = damage(folders[step])
        if problem is None:
            return folders[step]
        logger.warning("Passing over the damaged checkpoint %s: %s", folders[step], problem)
    return None
