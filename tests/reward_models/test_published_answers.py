"""Right answers and tests in the forms in which data sets are published: a column read wrongly gives every completion
the same score, and no error."""

import asyncio
import json

import pytest

from align.errors import RewardError
from align.reward_models.base import RewardBatch
from align.reward_models.build import build_reward
from align.reward_models.checkers import exact_answer, python_tests

VERL = {"ground_truth": "34", "style": "rule"}
SUM = "a, b = map(int, input().split())\nprint(a + b)"


def scores(spec, completions, **columns):
    return build_reward(spec).score(RewardBatch(["p"] * len(completions), completions, columns=columns)).scores.tolist()


def test_an_entry_of_a_column_of_mappings_is_named():
    """verl's parquet files, DAPO-Math-17k. The mapping itself was no answer, so that every completion had 0."""
    named = {"type": "math", "column": "reward_model.ground_truth"}
    assert scores(named, [r"\boxed{34}", r"\boxed{35}"], reward_model=[VERL] * 2) == [1.0, 0.0]
    with pytest.raises(RewardError, match=r"holds the names ground_truth, style.*column: reward_model\.ground_truth"):
        scores({"type": "math", "column": "reward_model"}, ["34"], reward_model=[VERL])
    with pytest.raises(RewardError, match="there is no ground_truth in the names style"):
        scores(named, ["34"], reward_model=[{"style": "rule"}])
    with pytest.raises(RewardError, match="the dataset has no column reward_model"):
        scores(named, ["34"], answer=["34"])
    assert scores({"type": "math", "column": "a.b"}, ["34"], **{"a.b": ["34"]}) == [1.0]


@pytest.mark.parametrize("answer", [["34"], '["34"]', [34]])
def test_one_answer_in_a_list(answer):
    """As Skywork-OR1 and others have it."""
    assert exact_answer("#### 34", answer) and not exact_answer("#### 35", answer)


@pytest.mark.parametrize("answer", [["34", "35"], '["34", "35"]', json.dumps({"func_name": "verify", "N": 1})])
def test_what_no_completion_could_be_equal_to_is_an_error(answer):
    """Several answers; the instruction-following rows of RLVR's mixture."""
    with pytest.raises(ValueError, match="no completion would be equal"):
        exact_answer("34", answer)


def test_an_answer_that_is_no_number_is_none():
    assert exact_answer("34", float("nan")) is None


HUMANEVAL = "METADATA = {'author': 'x'}\n\ndef check(candidate):\n    assert candidate(1, 2) == 3\n"
PYTEST = "from solution import add\n\ndef test_add():\n    assert add(1, 2) == 3\n"
UNITTEST = (
    "import unittest\nclass Test(unittest.TestCase):\n    def test(self):\n        self.assertEqual(add(1, 2), 3)\n"
)


@pytest.mark.parametrize("tests", [HUMANEVAL, PYTEST, UNITTEST, "{'a': 1}"])
def test_tests_that_run_nothing_are_an_error(tests):
    """HumanEval's column `test`, and tests of pytest and unittest: every program passed."""
    with pytest.raises(ValueError, match="every program would pass"):
        asyncio.run(python_tests("x = 1", tests))


def test_functions_that_are_called_are_tests():
    for code, passes in (("def add(a, b):\n    return a + b", True), ("def add(a, b):\n    return 0", False)):
        assert asyncio.run(python_tests(code, HUMANEVAL + "\ncheck(add)")) is passes


@pytest.mark.parametrize("names", [("input", "output"), ("inputs", "outputs")])
@pytest.mark.parametrize("write", [dict, json.dumps])
def test_inputs_and_outputs_side_by_side(names, write):
    """code_contests and APPS."""
    tests = write({names[0]: ["1 2\n", "4 5\n"], names[1]: ["3\n", "9\n"]})
    assert asyncio.run(python_tests(SUM, tests)) is True
    assert asyncio.run(python_tests("print(3)", tests)) is False


@pytest.mark.parametrize(
    "tests",
    [
        {"fn_name": "f", "inputs": ["1"], "outputs": ["1"]},
        json.dumps({"fn_name": "f", "inputs": [[1]], "outputs": [1]}),
        [{"input": "1", "output": "1", "testtype": "functional"}],
        [{"input": "1", "output": "1", "type": "function_call", "fn_name": "f"}],
    ],
)
def test_calls_of_a_function_are_no_inputs(tests):
    """APPS and others with the name of a function: every program passed, or none."""
    with pytest.raises(ValueError, match="calls of a function"):
        asyncio.run(python_tests("def f(a):\n    return a", tests))
