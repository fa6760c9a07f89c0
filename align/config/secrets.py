"""Tokens, passwords and keys: never written or printed, and read from the environment when they are used.

A secret is an option named in `SECRET_KEYS`, the value of a request's header, or the password and the keys of a URL. In
a file it stands best as `${NAME}`, which is kept as it is; one that is written out is masked in `align_config.yaml`,
in --dry-run, in logs and in errors.
"""

import os
import re
from typing import Any

from align.errors import ConfigError

MASK = "********"
SECRET_KEYS = ("hub_token", "headers")
OPEN_HEADERS = ("accept", "content-type", "user-agent")  # these say nothing secret
_NAME = r"\$(?:\{[A-Za-z_]\w*\}|[A-Za-z_]\w*)"
_VARIABLE = re.compile(_NAME)
# All of it is a variable, but for what announces it: a literal secret may well hold a dollar sign.
_REFERENCE = re.compile(rf"(?:(?:Bearer|Basic|Token)\s+)?{_NAME}|(?:{_NAME}|[^:$]*):{_NAME}@|{_NAME}@")
_USER = re.compile(r"(?<=://)[^/?#\s]+@")
_QUERY = re.compile(
    r"([?&;][^=&;\s#]*(?:key|token|secret|passw|pwd|auth|sig|credential)[^=&;\s#]*=)([^&;\s#'\"]+)", re.IGNORECASE
)


def masked(value: Any, key: str = "") -> Any:
    """A copy of a value of the option `key` (its last part) in which nothing secret is left. Other values than texts,
    mappings and lists are returned as they are."""
    if isinstance(value, dict):
        if key == "headers":
            return {name: v if str(name).lower() in OPEN_HEADERS else _hidden(v) for name, v in value.items()}
        return {name: masked(content, str(name)) for name, content in value.items()}
    if isinstance(value, list | tuple):
        return [masked(content, key) for content in value]
    if key in SECRET_KEYS:
        return None if value is None else _hidden(value)
    return masked_text(value) if isinstance(value, str) else value


def masked_text(text: str) -> str:
    """A text without the passwords and keys of the URLs in it."""
    text = _USER.sub(lambda found: found[0] if _REFERENCE.fullmatch(found[0]) else f"{MASK}@", text)
    return _QUERY.sub(lambda found: found[0] if _REFERENCE.fullmatch(found[2]) else found[1] + MASK, text)


def masked_tokens(tokens: list[str]) -> list[str]:
    """The words of a command line without the secrets among them."""
    shown = []
    for i, token in enumerate(tokens):
        option, _, value = token.partition("=")
        key = option.lstrip("-").rpartition(".")[2].replace("-", "_")
        before = tokens[i - 1].lstrip("-").replace("-", "_").split(".") if i else []
        if option.startswith("--") and value and key in SECRET_KEYS:
            shown.append(f"{option}={_hidden(value)}")
        elif any(name in SECRET_KEYS for name in before) and "=" not in tokens[i - 1]:
            shown.append(_hidden(token))
        else:
            shown.append(masked_text(token))
    return shown


def _hidden(value: Any) -> str:
    return value if isinstance(value, str) and _REFERENCE.fullmatch(value.strip()) else MASK


def expand(text: str, what: str) -> str:
    """`text` with the environment's values for `${NAME}` and `$NAME`; ConfigError naming `what` if one is not set."""

    def value(found: re.Match) -> str:
        name = found[0].strip("${}")
        if name not in os.environ:
            raise ConfigError(f"{what} needs the environment variable {name}, not set")
        return os.environ[name]

    return _VARIABLE.sub(value, text)


class Secret(str):
    """A token that is used as any text, and is not in what is pickled (`training_args.bin`) or shown by repr."""

    def __repr__(self) -> str:
        return repr(MASK)

    def __reduce__(self):
        return (str, (MASK,))

    def __deepcopy__(self, memo: dict) -> "Secret":
        return self
