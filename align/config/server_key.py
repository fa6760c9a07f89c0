"""The key that trainer and server share: from an environment variable, or from a file that its owner alone can read."""

import os
import secrets
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
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
            out.write(secrets.token_urlsafe(32) + "\n")
    return read_key(variable, file)
