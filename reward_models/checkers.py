r"""Ready verifiers, by import path: `{type: verifier, function: "align.reward_models.checkers:exact_answer"}`.

Each takes one completion, text or messages (then the last assistant message counts), and says whether it passes.
"""

import asyncio
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from decimal import Decimal, InvalidOperation
from pathlib import Path

FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)
OUTPUT_BYTES = 1 << 20  # what a tested program may write to any one file

RUNNER = """
import resource, runpy, sys
program, seconds, megabytes, most = sys.argv[1], *map(int, sys.argv[2:])
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
runpy.run_path(program, run_name="__main__")
"""


def exact_answer(completion, answer) -> bool:
    r"""Whether the completion's final answer is that of the column `answer`.

    The final answer is what follows the last "####" on its line, else what the last \boxed{} holds, else the whole
    text; of both sides, so that a column with a worked solution serves too. Numbers are compared as numbers (1,000.0 is
    1000), anything else as text without case, outer punctuation and repeated white space.
    """
    expected = _final(str(answer))
    if not expected:
        raise ValueError("the column answer is empty")
    return _comparable(_final(last_text(completion))) == _comparable(expected)


def regex(completion, pattern: str) -> bool:
    """Whether the regular expression `pattern` (an argument or a column) is found anywhere in the completion."""
    return re.search(pattern, last_text(completion)) is not None


async def python_tests(completion, tests: str, seconds: int = 10, megabytes: int = 1024) -> bool:
    """Whether the completion's Python code passes the statements of the column `tests` (asserts).

    The code is the last fenced block, else the whole text. Code and tests run as one program, in a process of its own,
    in an empty folder, without the environment's variables, limited in time, memory and output; running out of any of
    them is a failure, and so is leaving before the tests have ended. This guards against accidents, not against malice:
    code of untrusted origin needs a container around the whole run.
    """
    compile(tests, "<tests>", "exec")  # tests that are no Python would fail every completion
    blocks = FENCE.findall(last_text(completion))
    code = blocks[-1] if blocks else last_text(completion)
    return await asyncio.to_thread(_run_tests, code, tests, seconds, megabytes)


def last_text(completion: str | list[dict]) -> str:
    """The text of a completion: of messages that of the last one."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def _final(text: str) -> str:
    if "####" in text:
        return text.rpartition("####")[2].strip().partition("\n")[0].strip()
    start = text.rfind(r"\boxed{")
    if start < 0:
        return text.strip()
    inside = start + len(r"\boxed{")
    depth = 1
    for position in range(inside, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[inside:position].strip()
    return text[inside:].strip()


def _comparable(text: str) -> Decimal | str:
    plain = text.strip().strip(".").replace("$", "").replace(",", "").strip()
    try:
        number = Decimal(plain)
    except InvalidOperation:
        number = None
    if number is not None and number.is_finite():
        return number.normalize()
    return " ".join(text.casefold().split()).strip(" .,;:!?\"'")


def _run_tests(code: str, tests: str, seconds: int, megabytes: int) -> bool:
    done = secrets.token_hex(16)  # printed after the tests: a program that exits early has not passed them
    with tempfile.TemporaryDirectory() as folder:
        program, output = Path(folder, "program.py"), Path(folder, "output")
        program.write_text(f"{code}\n{tests}\nprint({done!r})\n", encoding="utf-8")
        with output.open("wb") as stdout:
            process = subprocess.Popen(
                [sys.executable, "-I", "-c", RUNNER, str(program), str(seconds), str(megabytes), str(OUTPUT_BYTES)],
                cwd=folder,
                env={},
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            try:
                status = process.wait(timeout=seconds)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                _end_session(process)
        return status == 0 and output.read_text(errors="replace").endswith(f"{done}\n")


def _end_session(process: subprocess.Popen) -> None:
    """End the program and what it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
