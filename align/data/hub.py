"""Names of the hub on a machine that does not reach it: found in the cache or refused at once, not after retries."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SECONDS = 3.0  # to answer
ASKED_AGAIN = 60.0  # seconds after which an answer is old
_last: tuple[float, str | None] | None = None


def unreachable() -> str | None:
    """Why the hub (or the mirror that HF_ENDPOINT names) does not answer; None if it does."""
    import requests
    from huggingface_hub import constants

    global _last
    if _last is None or time.monotonic() - _last[0] > ASKED_AGAIN:
        problem = None
        try:
            requests.head(constants.ENDPOINT, timeout=SECONDS)
        except requests.RequestException as error:
            kind = "no answer in time" if isinstance(error, requests.Timeout) else "no connection"
            problem = f"{constants.ENDPOINT} does not answer ({kind})"
        _last = (time.monotonic(), problem)
    return _last[1]


@contextmanager
def offline_if_unreachable(name: str) -> Iterator[str | None]:
    """The libraries of the hub take their cache alone inside, if `name` is no local path and the hub does not answer.
    Yields why, for an error's sentence; None where the hub answers or is not needed."""
    import datasets
    from huggingface_hub import constants

    if Path(name).expanduser().exists() or constants.HF_HUB_OFFLINE:
        yield "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else None
        return
    problem = unreachable()
    if problem is None:
        yield None
        return
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield problem
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def not_found(name: str, problem: str) -> str:
    """The sentence on a name that is neither here nor in the cache."""
    return f"there is no folder {name!r} here, it is not in the cache of the hub, and {problem}"
