"""How a vLLM server ends: soon, and with all that it has started, also where its engine hangs and calls wait for it.

vLLM kills its engine at a signal, then waits without limit for the calls under way, which nobody answers any more.
"""

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVarTuple

import psutil
import uvloop

Args = TypeVarTuple("Args")
CALLS = 3  # seconds in which calls under way are answered, or cut off
DEADLINE = 12.0  # seconds from the first signal to the end, by force if need be


class Ending:
    """Of this process. folder: removed with it."""

    def __init__(self, folder: str):
        self.folder = folder
        self.started: list[psutil.Process] | None = None  # by this process, as the first signal found them

    def begin(self) -> None:
        """The deadline runs. A second signal changes nothing."""
        if self.started is None:
            # now: those of an engine that is gone are no longer ours
            self.started = psutil.Process().children(recursive=True)
            threading.Thread(target=self._force, daemon=True).start()

    def finish(self) -> None:
        """Kill what is left, as the workers of an engine that was killed while they hung."""
        for process in self.started or ():
            with suppress(psutil.NoSuchProcess):
                # which ends by itself, after this process, and takes shared memory along
                if "multiprocessing.resource_tracker" not in " ".join(process.cmdline()):
                    process.kill()

    def _force(self) -> None:
        time.sleep(DEADLINE)
        print(
            f"align: error: the rollout server did not end within {DEADLINE:g} seconds of a signal, and is killed",
            file=sys.stderr,
            flush=True,
        )
        self.finish()
        shutil.rmtree(self.folder, ignore_errors=True)
        os._exit(1)

    def loop(self) -> uvloop.Loop:
        """An event loop for vLLM, whose handlers of signals begin the end as well."""
        ending = self

        class Loop(uvloop.Loop):
            def add_signal_handler(self, sig: int, callback: Callable[[*Args], object], *args: *Args) -> None:
                def told() -> None:
                    ending.begin()
                    callback(*args)

                super().add_signal_handler(sig, told)

        return Loop()
