"""The key that trainer and server share: from an environment variable, or from a file that its owner alone can read."""

import os
import secrets
import tempfile
from contextlib import suppress
from pathlib import Path

from align.errors import ConfigError

KEY_VARIABLE = "ALIGN_ROLLOUT_KEY"
VLLM_KEY_VARIABLE = "VLLM_API_KEY"  # vLLM's own name of the variable
KEY_FILE = Path("~/.config/align/rollout_key")  # of all servers and runs of one user, unless they name another


def read_key(variable: str, file: str | None, server: str = "the rollout server") -> str:
    """Raises `ConfigError` where there is neither, and for a file that others can read."""
    if key := os.environ.get(variable):
        return key
    path = Path(file or KEY_FILE).expanduser()
    if not path.is_file():
        raise ConfigError(
            f"no key for {server}: set the environment variable {variable}, or name the file that has it with "
            f"api_key_file ({path} does not exist)"
        )
    if path.stat().st_mode & 0o077:
        raise ConfigError(f"others can read the key of {server}: chmod 600 {path}")
    if not (key := path.read_text().strip()):
        raise ConfigError(
            f"the key file of {server} is empty: write it into {path}, or delete that for `align serve` to make one"
        )
    return key


def own_key(variable: str, file: str | None) -> str:
    """`read_key`; makes a key, and its file with mode 600, where there is none."""
    path = Path(file or KEY_FILE).expanduser()
    if not os.environ.get(variable) and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, made = tempfile.mkstemp(prefix=path.name, dir=path.parent)  # with mode 600
        try:
            with os.fdopen(handle, "w") as out:
                out.write(secrets.token_urlsafe(32) + "\n")
            _place(made, path)
        finally:
            os.unlink(made)
    return read_key(variable, file)


def _place(made: str, path: Path) -> None:
    """Copy the file of a new key to its place, unless another server was first: its key holds."""
    try:
        os.link(made, path)  # appears at once and whole, unlike a file that is being written
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        with suppress(FileExistsError):
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "wb") as out:
                out.write(Path(made).read_bytes())
