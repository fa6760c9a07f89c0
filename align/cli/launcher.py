"""`python -m align.cli.launcher ...`: accelerate's launcher, which takes the same arguments.

A process of the run that fails has said why, last of all. PyTorch's launcher would add a traceback of its own and a
table, and end with status 1 whatever the process ended with; here one line names the process, and its status is passed
on.

Signals are for the run, which ends with a checkpoint and status 75 after SIGTERM and SIGUSR1. PyTorch's launcher would
die of SIGUSR1 and leave its processes behind, and send SIGTERM to all of them, a second one, as soon as the first has
ended, then kill them after 30 seconds, while they may still be writing the checkpoint.
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
SAME = 2.0  # seconds in which signals are one: SLURM sends its own to every process of a job step, to us and to these
AFTER_FAILURE = 30.0  # seconds that the other processes have when one has failed: they may wait for it


def main() -> int:
    handler = PassOn()
    for number in SIGNALS:
        signal.signal(number, handler)
    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGHUP,SIGQUIT"  # torchrun's option: what its agent takes for itself
    from accelerate.commands.launch import main as launch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        launch()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return ended(f"process {rank} of the run", failure.exitcode)
    except subprocess.CalledProcessError as error:  # of a run of one process
        return ended("the run", error.returncode)
    except SignalException as error:
        return ended("the run", -error.sigval)
    return 0


class PassOn:
    """The handler of a signal: passes it on to the processes of the run, waits for them however long they take, and
    ends the launcher with their status. A second signal kills them."""

    def __init__(self):
        self.first: float | None = None
        self.processes: list = []

    def __call__(self, number, frame) -> None:
        if self.first is not None:
            if time.monotonic() - self.first > SAME:
                kill(self.processes)
            return
        self.first = time.monotonic()
        import psutil

        self.processes = psutil.Process().children()
        for process in self.processes:
            if not told_by_keyboard(number, process.pid):
                process.send_signal(number)
        codes = finished(self.processes) or [-number]  # none has been started yet
        failed = [code for code in codes if code not in (0, os.EX_TEMPFAIL)]
        code = (failed or [code for code in codes if code] or [0])[0]
        sys.exit(ended(f"the run, after {signal.Signals(number).name},", code) if code else 0)


def finished(processes: list) -> list[int]:
    """The exit codes of all, once all have ended; minus N after signal N. One that fails ends the others a little
    later; one that asks to be queued again (75) does not, since they may be writing their parts of the checkpoint."""
    import psutil

    left, end = processes, float("inf")
    while left:
        gone, left = psutil.wait_procs(left, timeout=0.2)
        if end == float("inf") and any(process.returncode not in (0, None, os.EX_TEMPFAIL) for process in gone):
            end = time.monotonic() + AFTER_FAILURE
        if time.monotonic() > end:
            kill(left)
    return [int(process.returncode or 0) for process in processes]


def kill(processes: list) -> None:
    """At once, with what they have started: PyTorch's launcher gives each process a session of its own."""
    for process in processes:
        with suppress(ProcessLookupError):  # it has just ended
            if process.is_running() and os.getpgid(process.pid) == process.pid:
                os.killpg(process.pid, signal.SIGKILL)
            elif process.is_running():
                process.kill()


def told_by_keyboard(number: int, process: int) -> bool:
    """Whether the terminal has sent the interrupt to this process too, as to all in the foreground."""
    if number != signal.SIGINT or os.getpgid(process) != os.getpgrp():
        return False
    try:
        with open("/dev/tty") as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:  # no terminal
        return False


def ended(who: str, code: int) -> int:
    """Say so, and the status to end with: as shells have it, 128 + N after signal N."""
    how = f"signal {-code}" if code < 0 else f"status {code}"
    print(f"align launch: {who} ended with {how}; its own words are above", file=sys.stderr)
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    sys.exit(main())
