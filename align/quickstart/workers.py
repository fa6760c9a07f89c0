"""Phases in processes of their own: side by side, where none needs what another makes."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from io import TextIOWrapper
from multiprocessing.connection import Connection
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import NamedTuple, cast

from align.errors import AlignError
from align.quickstart.progress import PhaseHandle, PhaseProgress, quieten
from align.quickstart.workspace import Workspace

AT_ONCE = 2  # each takes 1.4 GB, so more would not fit into the 4 GiB of a small machine


class Phase(NamedTuple):
    """`function(space, settings, seed, handle)` returns JSON values; it can begin when the phases `needs` are done."""

    function: Callable[..., dict]
    needs: tuple[str, ...]
    expected: float  # seconds that it adds to the whole, on two cores, for the estimate of the time left only


def run_phases(
    plan: dict[str, Phase],
    space: Workspace,
    arguments: tuple,
    progress: PhaseProgress,
    log: Path,
    backend: str = "auto",
    threads: int = 1,
) -> None:
    """Run the phases of `plan` that are not finished yet, each as soon as it can begin, at most AT_ONCE at a time.

    What they print goes to `log`; `backend` is that of their rollouts, `threads` those of torch in each. An error of
    one ends the others, and so does the end of this process.
    """
    waiting = [name for name in plan if not space.finished(name)]
    for name in plan:
        if name not in waiting:
            progress.skip(name)
    if not waiting:
        return
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    updates, (alive, owner) = context.SimpleQueue(), context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(AT_ONCE, context, initializer=_start, initargs=(alive, updates, log, threads))
    running: dict[Future, str] = {}
    pool.submit(_load_libraries, backend)  # in one process, while the first phase runs in the other
    try:
        while waiting or running:
            ready = [name for name in waiting if all(map(space.finished, plan[name].needs))]
            while ready and (not running or len(running) < side_by_side()):
                waiting.remove(name := ready.pop(0))
                progress.begin(name)
                running[pool.submit(_run, plan[name].function, (space, *arguments), name)] = name
            done, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
            while not updates.empty():
                progress.update(*updates.get())
            for future in done:
                result, seconds = future.result()
                name = running.pop(future)
                space.record(name, result, seconds)
                progress.end(name)
        pool.shutdown()  # processes that end by themselves give back what the system counts (semaphores)
    except BrokenProcessPool:
        raise AlignError(
            f"the process of {' or '.join(running.values())} ended by itself (killed: out of memory?). Its output is "
            f"in {log}. Start again to continue after the last finished phase"
        ) from None
    finally:
        owner.close()  # ends the processes, whatever they are at
        pool.shutdown(cancel_futures=True)


def side_by_side() -> int:
    """How many phases run at once: on a GPU one, as vLLM measures its free memory when it starts."""
    import torch

    return 1 if torch.cuda.is_available() else AT_ONCE


# ---- in the processes of the phases ----------------------------------------------------------------------------------

_updates: SimpleQueue | None = None  # (phase, fraction done), read by the main process


def _start(alive: Connection, updates: SimpleQueue, log: Path, threads: int) -> None:
    global _updates
    _updates = updates
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle
    threading.Thread(target=_end_with_main_process, args=(alive,), daemon=True).start()
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    cast(TextIOWrapper, sys.stdout).reconfigure(line_buffering=True)  # a process that is ended writes nothing more
    quieten()
    import torch

    torch.set_num_threads(threads)


def _end_with_main_process(alive: Connection) -> None:
    try:
        alive.recv()
    except EOFError:
        os._exit(1)


def _load_libraries(backend: str) -> None:
    """What takes the first ten seconds of a phase."""
    import align.trainers.remax  # noqa: F401
    from align.rollout.make import choose_backend

    if choose_backend(backend) == "vllm":
        import vllm  # noqa: F401


def _run(function: Callable[..., dict], arguments: tuple, name: str) -> tuple[dict, float]:
    start = time.perf_counter()
    result = function(*arguments, PhaseHandle(partial(_send, name)))
    return result, time.perf_counter() - start


def _send(name: str, fraction: float) -> None:
    cast(SimpleQueue, _updates).put((name, fraction))
