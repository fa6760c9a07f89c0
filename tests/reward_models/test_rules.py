import pytest

from align.errors import ConfigError, RewardError
from reward_models.base import RewardBatch
from reward_models.rules import RuleReward, import_function

BATCH = RewardBatch(["p", "q"], ["a", "bcd"], [[1], [2]], [[3], [4, 5]], columns={"answer": ["a", "x"]})


def length(completions):
    return [len(c) for c in completions]


def everything(prompts, completions, completion_ids, answer, factor=2.0, **kwargs):
    assert kwargs == {"prompt_ids": [[1], [2]]}
    return [factor * len(ids) + (c == a) for ids, c, a in zip(completion_ids, completions, answer, strict=True)]


async def later(completions):
    return [0.0] * len(completions)


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


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([1.0], "returned 1 values for 2 completions"),
        (1.0, "returned float for 2 completions"),
        ([1.0, None], "returned None for rows \\[1\\]"),
        ([float("nan"), 1.0], "returned nan for rows \\[0\\]"),
        (["1", 2.0], "returned '1' for rows \\[0\\]"),
    ],
)
def test_what_is_no_score_is_refused(scores, message):
    with pytest.raises(RewardError, match=f"'mine': .*{message}"):
        RuleReward(lambda completions: scores, name="mine").score(BATCH)


def test_missing_columns_and_errors_inside():
    with pytest.raises(RewardError, match="needs target, and there is only answer, completion_ids"):
        RuleReward(lambda completions, target: [0, 0], name="x").score(BATCH)
    with pytest.raises(ConfigError, match="is async"):
        RuleReward(later)

    def breaks(completions):
        return [1 / 0]

    with pytest.raises(ZeroDivisionError) as caught:
        RuleReward(breaks).score(BATCH)
    assert "raised by the reward function" in caught.value.__notes__[0]
