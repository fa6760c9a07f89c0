"""The key that trainer and server share: from an environment variable, or from a file that its owner alone can read."""

import os
import secrets
import tempfile
from contextlib import suppress
from pathlib import Path

from align.errors import ConfigError

KEY_VARIABLE = "ALIGN_ROLLOUT_KEY"
KEY_FILE = Path("~/.config/align/rollout_key")  # of all servers and runs of one user, unless they name another


def read_key(variable: str, file: str | None) -> str:
    """Raises `ConfigError` where there is neither, and for a file that others can read."""
    if key := os.environ.get(variable):
        return key
    path = Path(file or KEY_FILE).expanduser()
    if not path.is_file():
        raise ConfigError(
            f"no key for the rollout server: set the environment variable {variable}, or name the file that "
            f"`align serve` wrote with api_key_file ({path} does not exist)"
        )
    if path.stat().st_mode & 0o077:
        raise ConfigError(f"others can read the key of the rollout server: chmod 600 {path}")
    if not (key := path.read_text().strip()):
        raise ConfigError(f"the key file of the rollout server is empty: delete {path}, and `align serve` makes one")
    return key


def own_key(variable: str, file: str | None) -> str:
    """`read_key`; makes a key, and its file with mode 600, where there is none."""
    path = Path(file or KEY_FILE).expanduser()
    if not os.environ.get(variable) and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, made = tempfile.mkstemp(prefix=path.name, dir=path.parent)  # with mode 600
        with os.fdopen(handle, "w") as out:
            out.write(secrets.token_urlsafe(32) + "\n")
        with suppress(FileExistsError):  # another server was first: its key holds
            os.link(made, path)  # appears at once and whole, unlike a file that is being written
        os.unlink(made)
    return read_key(variable, file)
