"""Whether two mathematical answers are equal, by the package math-verify in a child process.

Computer algebra may take for ever, and so may C code inside it that no signal ends: the child is killed then, and
started anew for the next answer. `python -m align.reward_models.math_check` is the child.
"""

import functools
import importlib.util
import json
import os
import re
import resource
import select
import signal
import subprocess
import sys
import time

from align.errors import ConfigError, RewardError

MEMORY = 4 << 30  # bytes
WORDS = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}|\*\*|!")  # what is no formula: "12 apples", "**12**", not "2\pi"


def check_installed() -> None:
    if importlib.util.find_spec("math_verify") is None:
        raise ConfigError("a math reward needs the package math-verify: pip install 'align-rlhf[math]'")


class MathChecker:
    """One child process, which answers one question at a time."""

    def __init__(self):
        self.process: subprocess.Popen | None = None

    def equal(self, completion: str, answer: str, seconds: float, *, alone: bool) -> bool | None:
        """Whether the completion's answer is `answer`; False when that cannot be told within so many seconds of
        processor time, which do not depend on what else runs; None when `answer` itself cannot be read. alone: the
        completion is nothing but its answer."""
        process = self.process
        if process is None or process.poll() is not None:
            process = self._start()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps([completion, answer, seconds, alone]).encode() + b"\n")
            process.stdin.flush()
            return self._answer(20 * seconds + 60)
        except BaseException:  # interrupted: the next question must not get this one's answer
            self._end()
            raise

    def _start(self) -> subprocess.Popen:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "align.reward_models.math_check"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        )
        started = self.process
        if not self._answer(120.0):  # it says that it is ready
            raise RewardError("the process of math-verify did not start: does `import math_verify` work?")
        return started

    def _answer(self, seconds: float) -> bool | None:
        """The child's next line; False when it does not come in time (by the clock), and the child is ended."""
        assert self.process is not None and self.process.stdout is not None
        end, found, pipe = time.monotonic() + seconds, b"", self.process.stdout.fileno()
        while not found.endswith(b"\n"):
            part = b""
            if select.select([pipe], [], [], max(0.0, end - time.monotonic()))[0]:
                part = os.read(pipe, 100)
            if not part:  # too late, or it died
                self._end()
                return False
            found += part
        return json.loads(found)

    def _end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


class MathCheckers:
    """As many children as questions that are asked at a time; they stay for the next ones."""

    def __init__(self):
        self.free: list[MathChecker] = []

    def equal(self, completion: str, answer: str, seconds: float, *, alone: bool) -> bool | None:
        """As `MathChecker.equal`."""
        try:
            child = self.free.pop()
        except IndexError:
            child = MathChecker()
        try:
            return child.equal(completion, answer, seconds, alone=alone)
        finally:
            self.free.append(child)


@functools.cache
def checkers(process: int) -> MathCheckers:
    """Of this process: a fork must not share its parent's children."""
    return MathCheckers()


def serve() -> None:
    """Answer the questions on standard input until it ends."""
    from math_verify import parse, verify

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    out = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def read(text: str, formula: bool) -> list:
        """math-verify reads formulas between dollars, and takes 2 for (1, 2) and for 2\\pi without."""
        formula = formula and "$" not in text and "\\boxed" not in text
        return formula and parse(f"${text}$", parsing_timeout=None) or parse(text, parsing_timeout=None)

    verify(read("x+1", True), read("1+x", True), timeout_seconds=None)  # imports
    print("true", file=out, flush=True)
    for line in sys.stdin:
        completion, answer, seconds, alone = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)  # whose signal ends the process, C code or not
        try:
            wanted = read(answer, True)
        except Exception:  # the dataset's fault: no completion can be right, so the row is named (None)
            wanted = []
        try:
            given = read(completion, alone and WORDS.search(completion) is None)
            found = verify(wanted, given, timeout_seconds=None) if wanted else None
        except Exception:  # a policy writes any text whatever: what cannot be read is not the answer
            found = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(found), file=out, flush=True)


if __name__ == "__main__":
    serve()
