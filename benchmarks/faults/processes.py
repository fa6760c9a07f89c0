"""Child processes that start with everything imported, by fork, and tell how they ended."""

import json
import logging
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from align.errors import AlignError

LIMIT = 400.0
"""Seconds after which a child counts as hanging."""


def import_everything() -> None:
    """Everything that a run needs, once, so that children start at once."""
    import torch

    torch.set_num_threads(1)
    import bitsandbytes  # noqa: F401  (peft asks for it)
    import trl  # noqa: F401

    import align
    from align.lazy import load
    from align.methods import METHODS

    for method in METHODS.values():
        load(method.trainer), load(method.config)
        for further in (method.ensemble, method.sweep):
            if further:
                load(further)
    for name in align.__all__:
        getattr(align, name)


@dataclass
class Ended:
    """How a child ended: `value` that its function returned; or the sentence of its AlignError; or `problem`, what
    else came out of it (a traceback, a signal, silence). `killed`: by us."""

    value: object = None
    refused: str | None = None
    problem: str | None = None
    killed: bool = False


def start(folder: Path, function: Callable[[], object], environment: dict[str, str] | None = None) -> int:
    """Fork a process that runs `function` and writes what came of it to `folder/outcome.json`; its output goes to
    `folder/output.txt`, which is that of no earlier one. Returns its process id. Nothing of torch's threads may run in
    this process."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "outcome.json").unlink(missing_ok=True)
    sys.stdout.flush(), sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    try:
        os.setsid()
        out = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        os.dup2(out, 1), os.dup2(out, 2)
        logging.disable(logging.NOTSET)
        os.environ |= environment or {}
        outcome = _outcome(function)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.getrlimit(resource.RLIMIT_FSIZE)[1],) * 2)
        (folder / "outcome.json").write_text(json.dumps(outcome))
        sys.stdout.flush(), sys.stderr.flush()
    finally:
        os._exit(0)
    raise AssertionError  # for the type checker


def _outcome(function: Callable[[], object]) -> dict:
    try:
        return {"value": function()}
    except AlignError as error:
        return {"refused": str(error)}
    except SystemExit as error:
        return {"problem": f"exit {error.code}"}
    except BaseException:  # whatever the library lets out is what is looked for
        return {"problem": traceback.format_exc()[-3000:]}


def finish(folder: Path, child: int, seconds: float = LIMIT) -> Ended:
    """Wait for a child, and say how it ended."""
    end, status = time.monotonic() + seconds, None
    while status is None:
        done, found = os.waitpid(child, os.WNOHANG)
        if done:
            status = found
        elif time.monotonic() > end:
            kill(child)
            os.waitpid(child, 0)
            return Ended(problem=f"nothing after {seconds:g} s: it hangs")
        else:
            time.sleep(0.005)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        killed = number == signal.SIGKILL
        return Ended(killed=killed, problem=None if killed else f"ended by {signal.Signals(number).name}")
    if not (folder / "outcome.json").exists():
        return Ended(problem=f"ended with status {os.waitstatus_to_exitcode(status)} and no word")
    return Ended(**json.loads((folder / "outcome.json").read_text()))


def kill(child: int) -> None:
    """SIGKILL the child and what it has started (it leads a session of its own)."""
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:  # it has just ended, or not made its session yet
        os.kill(child, signal.SIGKILL)


def in_child(
    folder: Path,
    function: Callable[[], object],
    environment: dict[str, str] | None = None,
    seconds: float = LIMIT,
) -> Ended:
    return finish(folder, start(folder, function, environment), seconds)
