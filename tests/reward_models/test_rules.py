import asyncio
import sys
import threading

import numpy as np
import pandas as pd
import pytest
import torch

from align.errors import ConfigError, RewardError
from align.reward_models.base import RewardBatch
from align.reward_models.functions import import_function
from align.reward_models.rules import RuleReward

BATCH = RewardBatch(["p", "q"], ["a", "bcd"], [[1], [2]], [[3], [4, 5]], columns={"answer": ["a", "x"]})


def length(completions):
    return [len(c) for c in completions]


def everything(prompts, completions, completion_ids, answer, factor=2.0, **kwargs):
    assert kwargs.keys() == {"prompt_ids", "log_metric", "log_extra"} and kwargs["prompt_ids"] == [[1], [2]]
    return [factor * len(ids) + (c == a) for ids, c, a in zip(completion_ids, completions, answer, strict=True)]


def test_called_with_what_it_names():
    assert RuleReward(length).score(BATCH).scores.tolist() == [1.0, 3.0]
    assert RuleReward(everything).score(BATCH).scores.tolist() == [3.0, 4.0]
    assert RuleReward(length).name == "length" and RuleReward(length, name="brevity").name == "brevity"


def test_import_path_and_file(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text("def short(completions):\n    return [-len(c) for c in completions]\n")
    monkeypatch.chdir(tmp_path)
    for path in ("my_rewards:short", "my_rewards.py:short", f"{tmp_path}/my_rewards.py:short"):
        reward = RuleReward(path)
        assert reward.name == "short" and reward.score(BATCH).scores.tolist() == [-1.0, -3.0]
    with pytest.raises(ConfigError, match="no function 'shrt' there; it has short"):
        import_function("my_rewards.py:shrt")
    with pytest.raises(ConfigError, match="no file .*nowhere.py"):
        import_function("nowhere.py:short")
    with pytest.raises(ConfigError, match="no module 'nowhere'"):
        import_function("nowhere.rewards:short")
    with pytest.raises(ConfigError, match="expected package.module:name"):
        import_function("short")


def test_a_broken_module_of_the_user_shows_its_own_error(tmp_path, monkeypatch):
    (tmp_path / "needs_more.py").write_text("import not_installed_anywhere\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
        import_function("needs_more:f")


def test_a_file_imports_what_lies_beside_it(tmp_path):
    """From any folder, and its own of two helpers of one name."""
    for folder, score in (("a", 1.0), ("b", 2.0), ("a/c", 3.0)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "helper_of_tests.py").write_text(f"score = {score}\n")
        code = "from helper_of_tests import score\ndef f(completions):\n    return [score] * len(completions)\n"
        (tmp_path / folder / "mine.py").write_text(code)
    path = list(sys.path)
    found = [
        RuleReward(f"{tmp_path}/{folder}/mine.py:f").score(BATCH).scores[0].item() for folder in ("a", "b", "a/c", "a")
    ]
    assert found == [1.0, 2.0, 3.0, 1.0] and sys.path == path
    assert sys.modules.pop("helper_of_tests").score == 1.0


def test_a_file_imports_the_packages_beside_it(tmp_path):
    """Among them one that is called as a folder of this library; what is inside follows the package."""
    for folder, score in (("a", 1.0), ("b", 2.0)):
        for package, inside in (("trainers", f"from .{folder} import score"), ("align", "")):
            (tmp_path / folder / package).mkdir(parents=True)
            (tmp_path / folder / package / "__init__.py").write_text(inside)
        (tmp_path / folder / "trainers" / f"{folder}.py").write_text(f"score = {score}\n")
        code = "from trainers import score\nfrom align.errors import RewardError\ndef f(completions):\n"
        (tmp_path / folder / "mine.py").write_text(code + "    return [score] * len(completions)\n")
    before = {name: sys.modules.pop(name) for name in [*sys.modules] if name.split(".")[0] == "trainers"}
    found = [RuleReward(f"{tmp_path}/{folder}/mine.py:f").score(BATCH).scores[0].item() for folder in "aba"]
    left = {name: sys.modules.pop(name) for name in [*sys.modules] if name.split(".")[0] == "trainers"}
    sys.modules.update(before)
    assert found == [1.0, 2.0, 1.0] and left.keys() == {"trainers", "trainers.a"}
    assert sys.modules["align.errors"].RewardError is RewardError


@pytest.mark.parametrize(
    "scores",
    [
        np.array([1, 0], dtype=np.float16),
        np.array([True, False]),
        pd.Series([1.0, 0.0]),
        [np.float32(1), np.int64(0)],
        [np.bool_(True), np.False_],
        [np.array(1.0), np.array([0.0])],
        [torch.tensor(1.0), torch.tensor([0])],
        (torch.tensor(True), torch.tensor(0.0, requires_grad=True)),
    ],
    ids=repr,
)
def test_numbers_of_numpy_torch_and_pandas_are_scores(scores):
    """As with TRL; lists of tensors or of numpy's booleans were refused."""
    assert RuleReward(lambda completions: scores, name="mine").score(BATCH).scores.tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (np.array([[1.0], [0.0]]), "returned \\[1.0\\] for rows \\[0, 1\\]"),
        ([torch.tensor(float("nan")), 1.0], "returned nan for rows \\[0\\]"),
        ([1.0], "returned 1 values for 2 completions"),
        (1.0, "returned float for 2 completions: return a list with one score for each"),
        ([1.0, None], "has no score for rows \\[1\\] .*does not apply there"),
        ([1.0, 10**400], "returned 1000.* for rows \\[1\\]"),
        ([1.0, -(10**400)], "returned -1000.* for rows \\[1\\]"),
        ([1.0, float("-inf")], "returned -inf for rows \\[1\\]"),
        ([1e39, 1.0], "returned 1e\\+39 for rows \\[0\\]"),  # float32 would make it inf
        ([float("nan"), 1.0], "returned nan for rows \\[0\\]"),
        (["1", 2.0], "returned '1' for rows \\[0\\]"),
    ],
)
def test_what_is_no_score_is_refused(scores, message):
    with pytest.raises(RewardError, match=f"'mine'.*{message}"):
        RuleReward(lambda completions: scores, name="mine").score(BATCH)


def test_missing_columns_and_errors_inside():
    with pytest.raises(RewardError, match="needs target, and there is only answer, completion_ids"):
        RuleReward(lambda completions, target: [0, 0], name="x").score(BATCH)

    def breaks(completions):
        return [1 / 0]

    with pytest.raises(ZeroDivisionError) as caught:
        RuleReward(breaks).score(BATCH)
    assert "raised by the reward function" in caught.value.__notes__[0]


def test_async_functions_are_awaited_together_up_to_a_limit():
    running, most, sizes = 0, 0, []
    batch = RewardBatch(["p"] * 10, [f"c{i}" * (i + 1) for i in range(10)])

    async def judge(completions):
        nonlocal running, most
        running, sizes[:] = running + 1, [*sizes, len(completions)]
        most = max(most, running)
        await asyncio.sleep(0.01 * (10 - len(completions[0]) / 2))  # the first take longest: order must not change
        running -= 1
        return [len(c) for c in completions]

    expected = [2.0 * (i + 1) for i in range(10)]
    assert RuleReward(judge, batch_size=2, concurrency=3).score(batch).scores.tolist() == expected
    assert most == 3 and sizes == [2] * 5
    assert RuleReward(judge, batch_size=3).score(batch).scores.tolist() == expected and sizes[5:] == [3, 3, 3, 1]
    # without batch_size one call sees everything, as in TRL; and a notebook's own loop is not in the way
    sizes.clear()

    async def in_a_notebook():
        return RuleReward(judge).score(batch).scores.tolist()

    assert asyncio.run(in_a_notebook()) == expected and sizes == [10]
    assert RuleReward(judge).score(RewardBatch([], [])).scores.tolist() == []


def test_an_object_whose_call_is_async_is_awaited():
    class Client:
        async def __call__(self, completions):
            await asyncio.sleep(0)
            return [len(c) for c in completions]

    assert RuleReward(Client(), name="client").score(RewardBatch(["p"], ["abc"])).scores.tolist() == [3.0]


def test_async_clients_stay_on_one_loop():
    loops = []

    async def judge(completions):
        loops.append((id(asyncio.get_running_loop()), threading.get_ident()))
        return [0.0] * len(completions)

    for _ in range(2):
        RuleReward(judge).score(BATCH)
    assert loops[0] == loops[1]


def test_async_errors_are_those_of_plain_functions():
    async def breaks(completions):
        if completions == ["bcd"]:
            raise KeyError("no such key")
        await asyncio.sleep(30)

    with pytest.raises(KeyError) as caught:
        RuleReward(breaks, batch_size=1, name="judge").score(BATCH)  # without waiting for the other call
    assert "reward 'judge'" in caught.value.__notes__[0]

    async def short(completions):
        return [None for _ in completions]

    with pytest.raises(RewardError, match="'judge' has no score for rows \\[0, 1\\] of the batch"):
        RuleReward(short, batch_size=1, name="judge").score(BATCH)
    with pytest.raises(ConfigError, match="concurrency does nothing without batch_size"):
        RuleReward(length, concurrency=4)
    with pytest.raises(ConfigError, match="concurrency must be at least 1"):
        RuleReward(short, batch_size=1, concurrency=0)
    with pytest.raises(ConfigError, match="batch_size must be at least 1"):
        RuleReward(short, batch_size=0)


def test_arguments():
    reward = RuleReward(everything, arguments={"factor": 10.0})
    assert reward.score(BATCH).scores.tolist() == [11.0, 20.0]
    with pytest.raises(ConfigError, match="takes no factr: its parameters are completions"):
        RuleReward(length, arguments={"factr": 1})


def test_rows_of_the_dataset_are_named():
    batch = RewardBatch(["p", "q"], ["a", "b"], rows=[40, 41])
    with pytest.raises(RewardError, match="for rows \\[1\\] of the batch \\(\\[41\\] of the dataset\\)"):
        RuleReward(lambda completions: [1.0, "2"], name="x").score(batch)
    part = batch.select([1])
    assert (part.prompts, part.completions, part.rows, part.prompt_ids) == (["q"], ["b"], [41], None)


def test_functions_of_a_factory_are_called_by_the_name_that_they_were_given():
    """TRL's way: `function.__name__ = "..."`."""

    def factory(name):
        def function(completions):
            return [0.0] * len(completions)

        function.__name__ = name
        return function

    assert [RuleReward(factory(name)).name for name in ("short", "polite", "function")] == [
        "short",
        "polite",
        "function",
    ]
