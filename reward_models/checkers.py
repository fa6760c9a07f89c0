r"""Ready verifiers, by import path: `{type: verifier, function: "align.reward_models.checkers:exact_answer"}`.

Each takes one completion, text or messages (then the last assistant message counts), and says whether it passes.
"""

import ast
import asyncio
import json
import os
import re
import textwrap
from contextlib import suppress
from decimal import Decimal, InvalidOperation
from typing import Any

from align.reward_models.math_check import checkers
from align.reward_models.sandbox import output_of, passes_asserts

DECLARES = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Import | ast.ImportFrom | ast.Assign
PYTHON = ("python", "python3", "py")
# At the beginning of a line, or after other words if it names a language. What is possessive (`*+`) would else be gone
# back over for every character of a long line.
FENCE = re.compile(r"\s*```+\s*([\w+#.-]*+)[^`]*+$|[^`]+```+\s*(\w[\w+#.-]*)\s*$")
POWER_OF_TEN = re.compile(r"(?<![\w.])(\d++(?:\.\d*+)?)[eE]([+-]?\d++)(?![\w.]*\w)")
SPACE = r"\\[,;: ]"  # LaTeX's, as in 10\,000
SEPARATOR = rf"(?:,(?:\\!)?|\{{,\}}|{SPACE})"
THOUSANDS = re.compile(rf"[+-]?\d{{1,3}}({SEPARATOR}\d{{3}})+(\.\d*)?")  # "3,4" is a pair
SPACED = re.compile(rf"(?<![\w.,])\d{{1,3}}(?:{SPACE}\d{{3}})+(?!\d)")


def exact_answer(completion, answer) -> bool | None:
    r"""Whether the completion's final answer is that of the column `answer`.

    The final answer is what follows the last "####" on its line, or what the last \boxed{} holds, whichever comes
    later ("####" is also a heading), else the whole text; of both sides, so that a column with a worked solution serves
    too. Numbers are compared as numbers (1,000.0 is 1000), anything else as text without case, outer punctuation and
    repeated white space. None: the column has no answer.
    """
    expected = _expected(answer)
    return None if not expected else _comparable(_final(last_text(completion))) == _comparable(expected)


def regex(completion, pattern: str) -> bool:
    """Whether the regular expression `pattern` (an argument or a column) is found anywhere in the completion."""
    return re.search(pattern, last_text(completion)) is not None


def math_answer(completion, answer, seconds: float = 5.0) -> bool | None:
    """Whether the completion's answer equals the column `answer` as mathematics (package math-verify): 1/2 is 0.5,
    (x+1)^2 is x^2+2x+1. What is equal by `exact_answer` is not computed. What cannot be computed
    in `seconds` of processor time is not the answer. None: the column has no answer, or one that cannot be read."""
    text, expected = last_text(completion), _expected(answer)
    if (same := exact_answer(text, answer)) or same is None:
        return same
    marked = _mark(text) >= 0  # its line alone: of what comes after it math-verify would take the last number
    final = _written_out(_final(text) if marked else text, beyond="?")
    return checkers(os.getpid()).equal(final, _written_out(expected, beyond="??"), seconds, alone=marked)


def format_match(completion, pattern: str, anywhere: bool = False) -> bool:
    """Whether the whole completion (or, with `anywhere`, a part of it) has the regular expression's form; a dot stands
    for line breaks too."""
    text, found = last_text(completion), re.search if anywhere else re.fullmatch
    return found(pattern, text, re.DOTALL) is not None


async def python_tests(completion, tests: str | list, seconds: int = 10, megabytes: int = 1024) -> bool:
    """Whether the completion's Python code (`code_of`) passes the column `tests`.

    tests: statements (asserts) or a list of them, or a list of {"input", "output"} (or their lists, {"input": [...],
    "output": [...]}, as code_contests has them): what the program prints for each input must be the output, white space
    at the ends of lines and of the text aside. Outputs never reach the program's process; asserts run in it, after the
    program. Every program runs in an empty folder, without the environment's variables, limited in time, memory and
    output; running out of any of them is a failure. This guards against accidents, not against malice: code of
    untrusted origin needs a container around the whole run.
    """
    code = code_of(last_text(completion))
    tests = _tests(tests)
    if isinstance(tests, str):
        return await asyncio.to_thread(passes_asserts, code, tests, seconds, megabytes)
    for value in (test[side] for test in tests for side in ("input", "output")):
        if not isinstance(value, str | int | float):  # of a list no program reads or prints what Python writes for it
            raise ValueError(f"input and output of the column tests are texts, and one is {value!r:.60}")
    for test in tests:
        printed = await asyncio.to_thread(output_of, code, str(test["input"]), seconds, megabytes)
        if printed is None or _lines(printed) != _lines(str(test["output"])):
            return False
    return True


def _tests(tests: Any) -> str | list[dict]:
    """The column tests as statements or a list of {"input", "output"}; ValueError for what would pass, or fail, every
    program."""
    if isinstance(tests, str) and tests.lstrip()[:1] in ("[", "{"):
        with suppress(ValueError):  # then it is Python, and no JSON
            tests = json.loads(tests)
    if isinstance(tests, dict):  # lists side by side, as Arrow and APPS have them
        inputs, outputs = (tests.get(name, tests.get(name + "s")) for name in ("input", "output"))
        if isinstance(inputs, list) and isinstance(outputs, list) and len(inputs) == len(outputs):
            rest = {"fn_name": tests.get("fn_name")}
            tests = [{"input": a, "output": b, **rest} for a, b in zip(inputs, outputs, strict=True)]
    if isinstance(tests, list) and tests and all(isinstance(test, str) for test in tests):
        tests = "\n".join(tests)
    if isinstance(tests, str):
        tree = ast.parse(tests)
        compile(tree, "<tests>", "exec")  # tests that are no Python (a `return`, too) would fail every completion
        if not tree.body:
            raise ValueError("the column tests is empty, and every program would pass")
        if all(isinstance(node, DECLARES) or _is_constant(node) for node in tree.body):
            raise ValueError(
                "the column tests defines functions or names and runs none of them, so that every program would pass: "
                "add the calls, such as check(name_of_the_function) for HumanEval's, or test_one() for pytest's"
            )
        return tests
    if not tests or not all(isinstance(test, dict) and {"input", "output"} <= test.keys() for test in tests):
        raise ValueError('the column tests is neither asserts nor a list of {"input": ..., "output": ...}')
    for test in tests:
        kind = test.get("testtype") or test.get("type")
        if test.get("fn_name") or kind in ("functional", "function_call"):
            raise ValueError(
                "the column tests has calls of a function for tests, and here a program reads its input and prints its "
                "output: write them as asserts, such as assert name(1, 2) == 3"
            )
    return tests


def _is_constant(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and not any(isinstance(part, ast.Call | ast.Await) for part in ast.walk(node))


def code_of(text: str) -> str:
    """The last block that is fenced as Python, else the last that is fenced and names no language, else the whole text.
    A block that is not closed goes to the end of the text; one that is indented, as in a list, is moved to the left."""
    found: dict[str, str] = {}
    language: str | None = None
    lines: list[str] = []
    for line in text.replace("\r\n", "\n").split("\n"):  # not where a string has another kind of line break
        if language is not None and "```" in line:
            found[language] = _block([*lines, line.partition("```")[0]])
            language = None
        elif language is not None:
            lines.append(line)
        elif (fence := FENCE.match(line)) is not None:
            name = (fence[1] or fence[2] or "").lower()
            language, lines = "python" if name in PYTHON else name, []
    if language is not None:
        found[language] = _block(lines)
    return found.get("python", found.get("", text))


def _block(lines: list[str]) -> str:
    first = next((line for line in lines if line.strip()), "")
    return textwrap.dedent("\n".join(lines)) if first[:1].isspace() else "\n".join(lines)


def length_scores(completions, completion_ids=None, minimum=0, maximum=None, margin=0, unit="tokens") -> list[float]:
    """0 for a length in [minimum, maximum]; outside it falls by 1 over `margin` units and stays at -1 (with maximum and
    margin as in DAPO's soft overlong punishment, arXiv 2503.14476, eq. 13)."""
    if unit == "tokens" and completion_ids is None:
        raise ValueError("there are no token ids here: count words or characters")
    lengths = (
        [len(ids) for ids in completion_ids]
        if unit == "tokens"
        else [len(last_text(c).split()) if unit == "words" else len(last_text(c)) for c in completions]
    )
    outside = [max(minimum - n, 0 if maximum is None else n - maximum, 0) for n in lengths]
    return [-min(1.0, n / margin if margin else float(n > 0)) for n in outside]


def last_text(completion: str | list[dict]) -> str:
    """The text of a completion: of messages that of the assistant's last one, "" where it only calls tools."""
    if isinstance(completion, str):
        return completion
    said = [message.get("content") for message in completion if message.get("role", "assistant") == "assistant"]
    content = said[-1] if said else None
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content or [])


def _expected(answer) -> str:
    """The final answer of the column; "" for none."""
    if isinstance(answer, str) and answer.startswith(('["', '{"')):  # JSON, which no mathematics begins like
        with suppress(ValueError):
            answer = json.loads(answer)
    if isinstance(answer, list) and len(answer) == 1:
        (answer,) = answer
    if isinstance(answer, dict | list):
        held = f"the names {', '.join(answer)}" if isinstance(answer, dict) else f"{len(answer)} values"
        raise ValueError(
            f"the column with the right answer holds {held}, and no completion would be equal to that: name the entry "
            "that is the answer (column: reward_model.ground_truth), or make a column of it"
        )
    return "" if answer is None or answer != answer else _final(str(answer))


def _written_out(text: str, beyond: str) -> str:
    """Powers of ten as digits, which math-verify reads; it takes 5e9 for 5, and 10\\,000 for 10 times 0. beyond: stands
    for those of many digits, and is to be another on each side, or two such numbers were equal whatever they are."""

    def digits(found: re.Match) -> str:
        mantissa, power = Decimal(found[1]), int(found[2][:9])
        return f"{mantissa.scaleb(power):f}" if abs(power) < 50 and len(found[1]) <= 28 else beyond

    return POWER_OF_TEN.sub(digits, SPACED.sub(lambda found: re.sub(SPACE, "", found[0]), text))


def _mark(text: str) -> int:
    """Where the last "####" is, if that is what the final answer follows; else -1."""
    place = text.rfind("####")
    return place if place > text.rfind(r"\boxed{") else -1


def _final(text: str) -> str:
    if (mark := _mark(text)) >= 0:
        return text[mark + len("####") :].strip().partition("\n")[0].strip()
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


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


def _comparable(text: str) -> Decimal | str:
    plain = text.strip().rstrip(".").replace("\\$", "").replace("$", "").strip()  # of ".5" the point is the number's
    if THOUSANDS.fullmatch(plain):
        plain = re.sub(SEPARATOR, "", plain)
    try:
        number = Decimal(plain)
    except InvalidOperation:
        number = None
    if number is not None and number.is_finite():
        return number  # equal numbers are equal whatever their digits; nothing is computed that could overflow
    folded = " ".join(text.casefold().split())
    return folded.strip(" .,;:!?\"'") or folded
