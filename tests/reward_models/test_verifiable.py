"""Verifiable rewards by name, on completions of every kind."""

import os
import time

import pytest

from align.errors import ConfigError, RewardError
from align.reward_models import math_check
from align.reward_models.base import RewardBatch
from align.reward_models.build import build_reward, check_reward
from align.reward_models.checkers import code_of, exact_answer, last_text
from align.reward_models.sandbox import output_of


def score(spec, completions, **columns):
    batch = RewardBatch(["p"] * len(completions), completions, columns=columns, completion_ids=[[1] * 3, [1] * 9, [1]])
    return build_reward(spec).score(batch.select(range(len(completions))) if len(completions) == 3 else batch).scores


HOSTILE = [
    "#### 1e9999999",
    "#### -1E+999999999999999999999",
    r"\boxed{9^{9^{9^{9^9}}}}",
    r"\boxed{" * 2000,
    r"\boxed{\frac{1}{0}}",
    "\x00\ud800 ####",
    "9" * 100_000,
    "$" * 999,
    r"\boxed{10000000!!!}",
    "",
]


def test_exact_answer_is_total_and_exact():
    for completion in HOSTILE:
        assert exact_answer(completion, "5") is False
    assert exact_answer("#### 1e9999999", "1e9999999") and exact_answer("#### 1,234,567.50", "1234567.5")
    assert not exact_answer(r"\boxed{3,4}", "34") and not exact_answer("", "?") and exact_answer("?", "?")


def test_math():
    spec = {"type": "math", "seconds": 5, "column": "solution"}
    right = [r"so \boxed{\frac{1}{2}}", "The answer is $x^2 + 2x + 1$.", "#### 18", r"\boxed{3,4}"]
    batch = RewardBatch(["p"] * 4, right, columns={"solution": ["0.5", "(x+1)^2", "18.0", "34"]})
    assert build_reward(spec).score(batch).scores.tolist() == [1.0, 1.0, 1.0, 0.0]
    few = [HOSTILE[2], *HOSTILE[4:6], ""]  # the first is computed for ever: its process is killed
    batch = RewardBatch(["p"] * len(few), few, columns={"solution": ["5"] * len(few)})
    assert build_reward({**spec, "seconds": 0.5}).score(batch).scores.tolist() == [0.0] * len(few)
    assert build_reward(spec).score(RewardBatch(["p"], ["$5$ apples"], columns={"solution": ["5"]})).scores == 1.0
    with pytest.raises(RewardError, match="the dataset has no column solution \\(it has answer\\)"):
        build_reward(spec).score(RewardBatch(["p"], ["5"], columns={"answer": ["5"]}))


@pytest.mark.parametrize("written", [r"10\,000", "10{,}000", r"10,\!000", r"10\ 000", r"\$10,000"])
def test_thousands_as_latex_writes_them(written):
    """As competitions and models do: a right answer would have had no reward."""
    assert exact_answer(rf"so \boxed{{{written}}}", "10000") and exact_answer("10000", written)
    math = build_reward({"type": "math"})
    batch = RewardBatch(["p"] * 3, [rf"it is ${written}$", rf"\boxed{{{written}}}", r"\boxed{10}"])
    batch.columns = {"answer": [r"\frac{20000}{2}"] * 3}
    assert math.score(batch).scores.tolist() == [1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    "completion, answer, equal",
    [
        ("5e9", "5", 0.0),  # which math-verify takes for 5
        ("#### 5e9", r"\frac{10}{2}", 0.0),
        ("#### 5e-1", r"\frac{1}{2}", 1.0),
        ("so $x=1.2e+3$ it is", "1200", 1.0),
        (r"\boxed{3000/2}", "1.5e3", 1.0),
        (r"\boxed{5e-99999999999999999}", "5", 0.0),
        (r"\boxed{2e}", "2e", 1.0),
        ("#### 1e400", "1e401", 0.0),
        ("#### 1e401", "1e401", 1.0),
    ],
)
def test_math_reads_powers_of_ten(completion, answer, equal):
    reward = build_reward({"type": "math", "seconds": 5})
    assert reward.score(RewardBatch(["p"], [completion], columns={"answer": [answer]})).scores == equal


@pytest.mark.parametrize(
    "completion, answer, equal",
    [
        ("#### \\frac{1}{2}\nI checked this 7 times.", "0.5", 1.0),  # of which 7 was taken
        ("#### \\frac{1}{2}\nI checked this 7 times.", "7", 0.0),
        ("#### (1, 2)", "2", 0.0),
        ("#### (1, 2)", "(1,2)", 1.0),
        ("#### 2\\pi", "2", 0.0),
        ("#### 2\\pi", "\\pi + \\pi", 1.0),
        ("#### $(x+1)^2$", "x^2+2x+1", 1.0),
        ("#### 12 apples", "12", 1.0),
        ("#### $12 each", "12", 1.0),
        ("#### **12**", "12", 1.0),
        ("#### 12 km/h", "12", 1.0),
        ("#### x^2 + 3", "3", 0.0),
        ("#### Step 2: take 7\nSo it is \\boxed{\\frac{1}{2}}.", "0.5", 1.0),  # a heading
    ],
)
def test_math_takes_what_stands_on_the_line_of_the_mark(completion, answer, equal):
    reward = build_reward({"type": "math", "seconds": 5})
    assert reward.score(RewardBatch(["p"], [completion], columns={"answer": [answer]})).scores == equal


def test_math_of_a_row_whose_answer_cannot_be_read():
    batch = RewardBatch(["p"] * 2, ["#### 5"] * 2, columns={"answer": [r"\text{}", "5"]})
    with pytest.raises(RewardError, match=r"could not decide \(None\) for rows \[0\] .*: set on_none"):
        build_reward({"type": "math"}).score(batch)
    assert build_reward({"type": "math", "on_none": -1.0}).score(batch).scores.tolist() == [-1.0, 1.0]
    output = build_reward({"type": "math", "on_error": "mask"}).score(batch, partial=True)
    assert output.missing.tolist() == output.failed.tolist() == [True, False]
    output = build_reward({"type": "math", "on_error": "score", "error_score": 0.5}).score(batch)
    assert output.scores.tolist() == [0.5, 1.0] and output.extras["failed"].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("answer", [None, "", " ", "so it is ####", r"\boxed{}"])
@pytest.mark.parametrize("kind", ["math", "verifier"])
def test_a_row_without_an_answer_is_undecided(kind, answer):
    spec = {"type": kind} if kind == "math" else {"type": kind, "function": "align.reward_models.checkers:exact_answer"}
    batch = RewardBatch(["p"] * 2, ["None", ""], columns={"answer": [answer, answer]})
    with pytest.raises(RewardError, match=r"could not decide \(None\) for rows \[0, 1\] .*: set on_none"):
        build_reward(spec).score(batch)
    assert build_reward({**spec, "on_none": -1.0}).score(batch).scores.tolist() == [-1.0, -1.0]


def test_math_in_several_processes():
    """Each question gets its own answer, also beside one that is computed for ever."""
    before = len(math_check.checkers(os.getpid()).free)
    texts = [HOSTILE[2], r"\boxed{\frac{1}{2}}", r"\boxed{\frac{1}{3}}", HOSTILE[2], r"\boxed{\frac{2}{4}}"]
    batch = RewardBatch(["p"] * 5, texts, columns={"answer": ["0.5"] * 5})
    reward = build_reward({"type": "math", "seconds": 0.5, "concurrency": 3})
    assert reward.score(batch).scores.tolist() == [0.0, 1.0, 0.0, 0.0, 1.0]
    assert max(2, before) <= len(math_check.checkers(os.getpid()).free) <= max(3, before)


def test_messages_of_every_kind():
    """The assistant's last words count, not those of a tool, and there may be none."""
    said, told = {"role": "assistant", "content": "4"}, {"role": "tool", "content": "5"}
    calls = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    parts = {"role": "assistant", "content": [{"type": "text", "text": "4"}, {"type": "image"}]}
    talks = [[said, told], [said, calls, told], [parts], [told], [], [{"role": "assistant"}]]
    assert [last_text(talk) for talk in talks] == ["4", "", "4", "", "", ""]
    assert exact_answer([said, told], "4") and not exact_answer([said, told], "5")


def test_math_without_its_package(monkeypatch):
    monkeypatch.setattr(math_check.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs the package math-verify: pip install 'align-rlhf\\[math\\]'"):
        check_reward({"type": "math"})


def test_format_and_length():
    spec = {"type": "format", "pattern": "<think>.*</think> \\d+", "on_fail": -1.0}
    assert score(spec, ["<think>a\nb</think> 4", "x <think></think> 4", ""]).tolist() == [1.0, -1.0, -1.0]
    assert score({**spec, "anywhere": True}, ["", "x <think></think> 4", ""]).tolist() == [-1.0, 1.0, -1.0]
    with pytest.raises(ConfigError, match="pattern is no regular expression: unterminated"):
        check_reward({"type": "format", "pattern": "[a"})
    texts = ["one two", "a b c d e f", "x"]
    assert score({"type": "length", "maximum": 5, "margin": 8}, texts).tolist() == [0.0, -0.5, 0.0]
    assert score({"type": "length", "minimum": 2, "unit": "words"}, texts).tolist() == [0.0, 0.0, -1.0]
    assert score({"type": "length", "minimum": 2, "unit": "characters", "maximum": 7}, texts).tolist() == [0, -1, -1]
    for wrong, message in (({}, "a minimum, a maximum or both"), ({"minimum": 3, "maximum": 2}, "is below minimum")):
        with pytest.raises(ConfigError, match=message):
            check_reward({"type": "length", **wrong})


IO = [{"input": "2 3\n", "output": "5\n"}, {"input": "4 5\n", "output": "9"}]
CHEATS = [  # that look for what they are to print
    "import glob\nprint(open([f for f in glob.glob('*') if f != 'output'][0]).read())",
    "import sys, os\nprint(sys.argv, os.environ, open('/proc/self/cmdline').read())",
    "import sys, os\nprint(sys._getframe().f_back.f_locals, os.listdir('/proc/self/fd'))",
    "import sys\nprint(sys.modules['__main__'].__dict__)",
    "raise SystemExit(0)",
]


def test_unit_tests():
    spec = {"type": "unit_tests", "seconds": 20, "concurrency": 2}
    adds = "```python\na, b = map(int, input().split())\nprint(a + b, ' ')\n```"
    found = build_reward(spec).score(
        RewardBatch(["p"] * 2, [adds, adds.replace("+", "-")], columns={"tests": [IO, IO]})
    )
    assert found.scores.tolist() == [1.0, 0.0]
    asserts = "assert add(2, 3) == 5"
    batch = RewardBatch(["p"] * 10, CHEATS * 2, columns={"tests": [IO[:1]] * 5 + [asserts] * 5})
    assert build_reward(spec).score(batch).scores.tolist() == [0.0] * 10
    with pytest.raises(RewardError, match="row 0 .*neither asserts nor a list"):
        build_reward(spec).score(RewardBatch(["p"], ["1"], columns={"tests": [[{"in": 1}]]}))


HAVOC = [  # with the file that its output goes to
    "import os; os.unlink('output')",
    "import os; os.unlink('output'); os.mkdir('output')",
    "import os; os.unlink('output'); os.mkfifo('output')",  # which nobody writes to
    "import os; os.unlink('output'); os.symlink('/dev/zero', 'output')",
    "import os, shutil; shutil.rmtree(os.getcwd(), ignore_errors=True)",
    "import os; os.mkdir('d'); open('d/f', 'w'); os.chmod('d', 0)",
]


def test_a_program_is_judged_by_what_it_printed_whatever_it_does_to_files(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    spec = {"type": "unit_tests", "seconds": 20}
    codes = [f"{code}\nprint({number})" for code in HAVOC for number in (5, 6)]
    batch = RewardBatch(["p"] * len(codes), codes, columns={"tests": [IO[:1]] * len(codes)})
    assert build_reward(spec).score(batch).scores.tolist() == [1.0, 0.0] * len(HAVOC)
    assert list(tmp_path.iterdir()) == []


def test_numpy_of_a_program_has_one_thread():
    """Of one per core each takes 40 MB of the address space that `megabytes` limits: on a machine of 64 cores no
    program that imports numpy would pass."""
    names = ["OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"]
    assert output_of(f"import os\nprint([os.environ[name] for name in {names}])", "", 10, 512) == "['1', '1', '1']\n"


def test_a_program_that_does_not_read_its_tests_is_ended():
    code = "import os, time\nos.write(3, b'ready\\n')\ntime.sleep(60)"
    batch = RewardBatch(["p"], [code], columns={"tests": ["assert True\n" * 20_000]})
    start = time.monotonic()
    assert build_reward({"type": "unit_tests", "seconds": 1}).score(batch).scores == 0.0
    assert time.monotonic() - start < 30


def test_a_long_line_is_read_in_time():
    line = "```" + "a" * 200_000 + "`"  # minutes, for a regular expression that goes back over it
    start = time.monotonic()
    assert code_of(line) == line and time.monotonic() - start < 10


def test_a_program_cannot_print_the_word_that_says_passed():
    """It is sent with the tests, when the program has run."""
    code = "import os, sys\nos.write(3, b'ready\\n')\nos.write(1, b'ready\\n')\nos._exit(0)"
    spec = {"type": "unit_tests", "seconds": 5}
    assert build_reward(spec).score(RewardBatch(["p"], [code], columns={"tests": ["assert True"]})).scores == 0.0
