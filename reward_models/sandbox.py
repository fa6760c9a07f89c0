"""Programs of a policy, run in processes of their own with limits."""

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MARK = "ALIGN_PROGRAM"  # by whose value what a program has started is found
# Each thread of numpy's takes 40 MB of address space: with one per core of a large machine, every program that imports
# it would be out of memory.
ONE_THREAD = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
OUTPUT_BYTES = 1 << 20  # that a program may write to any one file, its output included

LIMITS = """
import resource
def limit(seconds, megabytes, most):
    for name, value in (("CPU", seconds), ("AS", megabytes << 20), ("FSIZE", most), ("CORE", 0), ("NOFILE", 64)):
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))
"""
# The tests come when the program has run: nothing of them is in its files, arguments or memory before.
ASSERTS = (
    LIMITS
    + """
import io, json, os, sys
limit(*map(int, sys.argv[1:]))
report = os.dup(1)
lines = os.fdopen(os.dup(0), "r", encoding="utf-8")
code = json.loads(lines.readline())
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
os.dup2(os.open("output", os.O_WRONLY | os.O_CREAT), 1)
names = {"__name__": "__main__"}
exec(compile(code, "program.py", "exec"), names)
os.write(report, b"ready\\n")
tests, word = json.loads(lines.readline())
exec(compile(tests, "tests.py", "exec"), names)
os.write(report, word.encode())
"""
)
PROGRAM = (
    LIMITS
    + """
import json, runpy, sys
limit(*map(int, sys.argv[1:]))
runpy.run_path("program.py", run_name="__main__")
"""
)


def passes_asserts(code: str, tests: str, seconds: int, megabytes: int) -> bool:
    """Whether `tests`, statements, run to their end in the program's own process after it.

    The word that says so is sent with the tests, so a program that leaves early, or prints what it finds in its own
    source, has not passed. Tests and program share a process: a program that sets out to deceive them can.
    """
    word, mark = os.urandom(16).hex(), os.urandom(16).hex()
    with _empty_folder() as folder, _started(ASSERTS, folder, seconds, megabytes, mark) as process:
        late = threading.Timer(seconds, _end, (process, mark))  # for a program that does not read what it is sent
        late.start()
        try:
            end = time.monotonic() + seconds
            if not _send(process, code) or _read(process, 6, end) != b"ready\n" or not _send(process, [tests, word]):
                return False
            return _read(process, len(word), end) == word.encode()
        finally:
            late.cancel()
            _end(process, mark)


def output_of(code: str, text: str, seconds: int, megabytes: int) -> str | None:
    """What the program prints when `text` is its input; None if it fails, or takes too much."""
    mark = os.urandom(16).hex()
    with _empty_folder() as folder:
        Path(folder, "program.py").write_text(code, encoding="utf-8", errors="replace")
        Path(folder, "input").write_text(text, encoding="utf-8")
        with (
            open(Path(folder, "input"), "rb") as given,
            open(Path(folder, "output"), "w+b") as output,
            _started(PROGRAM, folder, seconds, megabytes, mark, stdin=given, stdout=output) as process,
        ):
            try:
                status = process.wait(timeout=seconds)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                _end(process, mark)
            # not by its name, under which the program may have put anything else
            printed = os.pread(output.fileno(), OUTPUT_BYTES, 0).decode("utf-8", errors="replace")
        return printed if status == 0 else None


@contextmanager
def _empty_folder() -> Iterator[str]:
    """A temporary one, deleted at the end whatever a program has made in it."""
    folder = tempfile.mkdtemp()
    try:
        yield folder
    finally:
        try:
            shutil.rmtree(folder)
        except (OSError, RecursionError):  # it may not be entered, or a thousand folders lie in each other
            for command in (["chmod", "-R", "u+rwx", folder], ["rm", "-rf", folder]):
                subprocess.run(command, stderr=subprocess.DEVNULL, check=False)


def _started(runner: str, folder: str, seconds: int, megabytes: int, mark: str, **streams) -> subprocess.Popen:
    """A Python that has no variables of the environment, in a session of its own."""
    return subprocess.Popen(
        [sys.executable, "-I", "-c", runner, str(seconds), str(megabytes), str(OUTPUT_BYTES)],
        cwd=folder,
        env={MARK: mark, **ONE_THREAD},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, **streams},
    )


def _send(process: subprocess.Popen, message) -> bool:
    """One line of JSON; False if nobody reads it."""
    assert process.stdin is not None  # a pipe
    try:
        process.stdin.write(json.dumps(message).encode() + b"\n")
        process.stdin.flush()
        return True
    except (BrokenPipeError, ConnectionResetError):
        with suppress(BrokenPipeError):  # of what is still in the buffer, else raised where Popen closes it
            process.stdin.close()
        return False


def _read(process: subprocess.Popen, count: int, end: float) -> bytes:
    """Up to `count` bytes of what it reports, fewer when it ends or the time is over."""
    assert process.stdout is not None  # a pipe
    found, pipe = b"", process.stdout.fileno()
    while len(found) < count and select.select([pipe], [], [], max(0.0, end - time.monotonic()))[0]:
        part = os.read(pipe, count - len(found))
        if not part:
            break
        found += part
    return found


def _end(process: subprocess.Popen, mark: str) -> None:
    """End a program and what it has started, sessions of their own too (on Linux, where /proc shows them)."""
    end_session(process)
    wanted = f"{MARK}={mark}".encode()
    for _ in range(10):  # what is started meanwhile is found the next time
        found = [entry for entry in Path("/proc").glob("[0-9]*") if wanted in _environment(entry).split(b"\0")]
        if not found:
            return
        for entry in found:
            with suppress(ProcessLookupError):
                os.kill(int(entry.name), signal.SIGKILL)


def _environment(process: Path) -> bytes:
    """Of a process in /proc; nothing of one that has ended or is another user's."""
    try:
        return (process / "environ").read_bytes()
    except OSError:
        return b""


def end_session(process: subprocess.Popen) -> None:
    """End a process that leads a session or group of its own, and what it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
