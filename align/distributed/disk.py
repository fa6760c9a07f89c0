"""Writing where there may be no room, no right, or something in the way."""

import errno
import os
import re
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path

from align.errors import TrainingError

OF_THE_DISK = {
    *(errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
    *(errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP),
}
NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
RUST = re.compile(r"\(os error (\d+)\)")  # safetensors and tokenizers, in exceptions of their own
TORCH = ("PytorchStreamWriter failed", "inline_container", "iostream error")  # torch.save, which does not say why


RESUME = "start again: with resume_from_checkpoint: auto a run goes on from its newest whole checkpoint"


@contextmanager
def writing(what: str | Path, then: str = RESUME):
    """`TrainingError`, in one sentence, where something could not be written: a full disk, a quota, a folder of
    another user, a file where a folder should be. what: a file or folder, for the sentence. then: what to do."""
    try:
        yield
    except Exception as error:  # the libraries that write have no class in common
        why = reason(error, str(what))
        if why is None:
            raise
        path = getattr(error, "filename", None) or what
        raise TrainingError(f"{path} cannot be written: {why}. When that is mended, {then}") from error


def write_whole(path: Path, lines: Iterable[str], then: str = RESUME) -> None:
    """Write a whole text file: a kill, a full disk or a power loss leaves the old one or the new one, never a part."""
    temporary = path.with_suffix(path.suffix + ".tmp")
    with writing(path, then):
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def no_room(error: BaseException | None) -> bool:
    """Whether an error, or one that it came of, is a full disk's: libraries raise their own on top of it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            return True
        error = error.__cause__ or error.__context__
    return False


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def open_to_others(folder: str | Path) -> None:
    """Weights in `folder` may be read by whom the umask lets read the files beside them: safetensors from 0.8 on writes
    for the owner alone, and a server of another user would find no model (its issue 782)."""
    for path in Path(folder).glob("*.safetensors"):
        if path.stat().st_uid == os.getuid():
            path.chmod(0o666 & ~umask())


def reason(error: Exception, what: str) -> str | None:
    """What the disk said; None for what is no error of writing."""
    if getattr(error, "__notes__", None):  # of a function of the user's, which it says
        return None
    found = RUST.search(str(error))
    number = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
    made = isinstance(error, OSError) and number == errno.ENOENT and str(error.filename or "").startswith(what)
    if made or number in OF_THE_DISK:  # made: a folder cannot be made below one like /proc
        return os.strerror(number or 0) + (
            " (no room on the disk, or a limit of file sizes)" if number in NO_ROOM else ""
        )
    if isinstance(error, RuntimeError) and any(words in str(error) for words in TORCH):
        return "writing broke off (no room on the disk, or no right to write there)"
    return None
