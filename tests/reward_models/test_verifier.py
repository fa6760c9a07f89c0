import asyncio
import time
from pathlib import Path

import pytest

from align.errors import ConfigError, RewardError
from align.reward_models import checkers
from align.reward_models.base import RewardBatch
from align.reward_models.build import build_reward
from align.reward_models.checkers import exact_answer, python_tests, regex
from align.reward_models.verifier import VerifierReward

BATCH = RewardBatch(
    ["p", "q", "r"], ["4", "5", "?"], [[1], [2], [3]], [[4], [5], [6]], columns={"answer": [4, 4, 4]}, rows=[10, 11, 12]
)


def right(completion, answer):
    return None if completion == "?" else int(completion) == answer


def crashes(completion):
    return int(completion) > 0


def test_every_outcome_has_its_score():
    reward = VerifierReward(right, on_pass=2.0, on_fail=-1.0, on_none=0.5)
    output = reward.score(BATCH)
    assert output.scores.tolist() == [2.0, -1.0, 0.5] and reward.name == "right"
    assert output.extras["undecided"].tolist() == [0.0, 0.0, 1.0]
    two = BATCH.select([0, 1])
    assert VerifierReward(right).score(two).scores.tolist() == [1.0, 0.0]
    assert VerifierReward(right).score(two).extras == {}
    with pytest.raises(RewardError, match="'right': .* could not decide \\(None\\) for rows \\[2\\] .*: set on_none"):
        VerifierReward(right).score(BATCH)


def test_it_gets_what_it_names():
    def everything(prompt, completion, prompt_ids, completion_ids, answer, strict=False):
        return [prompt, completion, prompt_ids, completion_ids, answer, strict] == ["p", "4", [1], [4], 4, True]

    reward = VerifierReward(everything, arguments={"strict": True})
    assert reward.score(BATCH).scores.tolist() == [1.0, 0.0, 0.0]
    with pytest.raises(RewardError, match="needs target, and there is only answer, completion"):
        VerifierReward(lambda completion, target: True, name="x").score(BATCH)


def test_a_crash_is_an_error_that_names_the_row():
    async def crashes_later(completion):
        await asyncio.sleep(0)
        return crashes(completion)

    for function in (crashes, crashes_later):
        with pytest.raises(
            RewardError, match="failed on row 2 of the batch \\(row 12 of the dataset\\) with ValueError"
        ):
            VerifierReward(function).score(BATCH)


def test_what_is_no_outcome_is_refused():
    with pytest.raises(RewardError, match="returned 0.7 for row 0 of the batch .*a reward of type rule"):
        VerifierReward(lambda completion: 0.7).score(BATCH)
    with pytest.raises(ConfigError, match="on_fail must be a finite number, got nan"):
        VerifierReward(right, on_fail=float("nan"))


def test_async_checks_run_together():
    running, most = 0, 0

    async def check(completion):
        nonlocal running, most
        running, most = running + 1, max(most, running + 1)
        await asyncio.sleep(0.01)
        running -= 1
        return completion == "4"

    batch = RewardBatch(["p"] * 12, ["4"] * 12)
    assert VerifierReward(check, concurrency=5).score(batch).scores.tolist() == [1.0] * 12
    assert most == 5


def test_spec():
    spec = {"type": "verifier", "function": "align.reward_models.checkers:regex", "arguments": {"pattern": "^\\d$"}}
    reward = build_reward({**spec, "name": "digit", "on_fail": -1})
    assert reward.name == "digit" and reward.score(BATCH).scores.tolist() == [1.0, 1.0, -1.0]
    with pytest.raises(ConfigError, match="unknown key reward.on_fial of a verifier reward; nearest valid: on_fail"):
        build_reward({**spec, "on_fial": 0})
    with pytest.raises(ConfigError, match="takes no patern: its parameters are completion, pattern"):
        build_reward({**spec, "arguments": {"patern": "x"}})


# ---- checkers


@pytest.mark.parametrize(
    ("completion", "answer", "passes"),
    [
        ("The sum is\n#### 1,000", "1000.0", True),
        ("#### 7\n#### 8 apples", "8", False),
        ("#### 8\nDone.", "He has 3 + 5.\n#### 8", True),
        (r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}", True),
        (r"\boxed{1} or \boxed{2}", "1", False),
        ("#### Step 2: add\nSo it is \\boxed{5}", "5", True),  # a heading
        (r"I think \boxed{3}, no" + "\n#### 5", "5", True),
        (r"#### \boxed{5}", "5", True),
        ("#### .5", "5", False),
        ("#### .5", "0.50", True),
        ("#### 5.", "5", True),
        (" Paris. ", "paris", True),
        ("It is Paris", "Paris", False),
        ("$5", 5, True),
        ([{"role": "assistant", "content": "#### 4"}], "4", True),
        ("nan", "nan", True),
        ("", "0", False),
    ],
)
def test_exact_answer(completion, answer, passes):
    assert exact_answer(completion, answer) is passes


def test_exact_answer_needs_an_answer():
    batch = RewardBatch(["p"], ["4"], columns={"answer": [""]})
    with pytest.raises(RewardError, match=r"could not decide \(None\) for rows \[0\]"):
        VerifierReward(exact_answer).score(batch)


def test_regex():
    assert regex("<think>a</think> b", r"^<think>.*</think>") and not regex("b", "a+")
    with pytest.raises(RewardError, match="failed on row 0"):
        VerifierReward(regex, arguments={"pattern": "("}).score(BATCH)


GOOD = "Here it is:\n```python\ndef add(a, b):\n    return a + b\n```\nIt adds."
TESTS = "assert add(1, 2) == 3\nassert add(-1, 1) == 0"


def run(completion, tests=TESTS, **options):
    return asyncio.run(python_tests(completion, tests, **options))


def test_python_tests():
    assert run(GOOD) is True
    assert run("def add(a, b):\n    return a + b") is True
    assert run(GOOD.replace("+", "-")) is False
    assert run("this is no program") is False
    assert run("def add(a, b):\n    return a + b\nraise SystemExit(0)") is False  # exit 0 is not passing
    assert run(GOOD, TESTS.splitlines()) is True
    for tests in ("assert add(1, 2) ==", "return add(1, 2) == 3"):  # the second can be parsed, and not compiled
        with pytest.raises(SyntaxError):
            run(GOOD, tests)
    with pytest.raises(ValueError, match="tests is empty"):
        run(GOOD, "# none yet")
    assert run("print(input())", [{"input": 1, "output": 1}]) is True
    with pytest.raises(ValueError, match=r"input and output of the column tests are texts, and one is \['1'\]"):
        run("print(input())", [{"input": ["1"], "output": "1"}])


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("```bash\npip install x\n```\nThen:\n```python\na = 1\n```\nIt prints\n```\n1\n```\n", "a = 1\n"),
        ("```\nb = 1\n```\n\n```text\n1\n```\n", "b = 1\n"),
        ("Cut off:\n```Python3\nc = 1", "c = 1"),
        ("```py\r\nd = 1\r\n```", "d = 1\n"),
        ("1. so\n   ```python\n   if e:\n       pass```\n", "if e:\n    pass"),
        ("Sure: ```python\ng = 1\n```\nIt is one.", "g = 1\n"),
        ("1. ```py\nh = 1\n```", "h = 1\n"),
        ("- ```py\n\n  for j in x:\n    j\n  ```", "\nfor j in x:\n  j\n"),
        ("It goes between ```.\n```python\ni = 1\n```", "i = 1\n"),
        ("```\nprint('a\u2028b')\n```", "print('a\u2028b')\n"),
        ("say ``` or `x`: f = 1", "say ``` or `x`: f = 1"),
        ("```json\n{}\n```", "```json\n{}\n```"),
    ],
)
def test_the_code_of_an_answer(text, code):
    assert checkers.code_of(text) == code


def test_python_tests_are_contained(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "xyz")
    add = "def add(a, b):\n    return a + b\n"
    start = time.monotonic()
    assert run(f"{add}while True: pass", seconds=1) is False
    assert run(f"{add}import time\ntime.sleep(60)", seconds=1) is False
    assert time.monotonic() - start < 8
    assert run(f"{add}x = bytearray(1 << 30)", megabytes=256) is False
    assert run(f"{add}print('x' * (1 << 24))") is False
    assert run(f"{add}import os\nassert 'SECRET' not in os.environ and len(os.listdir()) == 1") is True
    # what it starts ends with it
    child = tmp_path / "pid"
    for options in ("", ", start_new_session=True"):
        started = f"subprocess.Popen(['/bin/sleep', '60']{options}).pid"
        assert run(f"{add}import subprocess\nopen({str(child)!r}, 'w').write(str({started}))") is True
        end = time.monotonic() + 10
        while runs(child.read_text()) and time.monotonic() < end:  # it is killed, which takes a moment
            time.sleep(0.05)
        assert not runs(child.read_text())


def runs(process: str) -> bool:
    try:
        return Path("/proc", process, "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_every_checker_is_documented():
    for function in (exact_answer, regex, python_tests):
        assert getattr(checkers, function.__name__) is function and function.__doc__
