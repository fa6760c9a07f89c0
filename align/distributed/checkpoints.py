"""Checkpoints that are whole or not there.

transformers writes a `checkpoint-<step>` folder file by file, so a killed job leaves a folder that looks like a
checkpoint. A manifest (name, size and CRC-32 of every file) is written to a temporary name and renamed as the very
last act: a folder without it, or that does not match it, is not a checkpoint. This works for every back-end (FSDP and
DeepSpeed write their shards themselves), which renaming the whole folder does not.
"""

import json
import logging
import os
import re
import zlib
from pathlib import Path

logger = logging.getLogger(__name__)

MANIFEST = "align_manifest.json"


def _crc32(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            crc = zlib.crc32(chunk, crc)
    return crc


def write_manifest(folder: str | Path) -> None:
    """Declare `folder` complete. Call once, after everything in it is written, on one process."""
    folder = Path(folder)
    files = {
        str(path.relative_to(folder)): {"size": path.stat().st_size, "crc32": _crc32(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (MANIFEST, MANIFEST + ".tmp")
    }
    temporary = folder / (MANIFEST + ".tmp")
    with temporary.open("w") as file:
        json.dump({"files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(folder / MANIFEST)


def damage(folder: str | Path) -> str | None:
    """What is wrong with a checkpoint, in words; None when it is whole."""
    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        return f"no {MANIFEST}: it was never finished"
    except json.JSONDecodeError as error:
        return f"{MANIFEST} cannot be read: {error}"
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["size"]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected['size']}"
        if _crc32(path) != expected["crc32"]:
            return f"{name} does not match its checksum"
    return None


def newest_whole(output_dir: str | Path) -> Path | None:
    """The newest undamaged checkpoint below `output_dir`; every damaged one that is passed over is warned about."""
    folders = {
        int(match.group(1)): path
        for path in Path(output_dir).glob("checkpoint-*")
        if path.is_dir() and (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }
    for step in sorted(folders, reverse=True):
        problem = damage(folders[step])
        if problem is None:
            return folders[step]
        logger.warning("Passing over the damaged checkpoint %s: %s", folders[step], problem)
    return None
