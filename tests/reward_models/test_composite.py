import pytest
import torch

from align.errors import AlignError, ConfigError, RewardError
from align.reward_models.base import Reward, RewardBatch, RewardOutput
from align.reward_models.build import build_reward, check_reward
from align.reward_models.composite import CompositeReward
from align.reward_models.ensemble import RewardEnsemble
from tests.reward_models import worlds

BATCH = RewardBatch(["p", "q"], ["a", "bcd"])


class Fixed(Reward):
    def __init__(self, name, *scores):
        self.name, self.scores = name, torch.tensor(scores)

    def _score(self, batch):
        return RewardOutput(self.scores)


def length(completions):
    return [len(c) for c in completions]


def starts(completion):
    return completion.startswith("a")


def test_weighted_sum_and_columns():
    ensemble = RewardEnsemble([Fixed("m", 1.0, 3.0), Fixed("n", 3.0, 3.0)], "mean", name="rm")
    reward = CompositeReward([ensemble, Fixed("b", 10.0, -1.0)], {"rm": 0.5, "b": 2.0}, name="all")
    output = reward.score(BATCH)
    assert output.scores.tolist() == [0.5 * 2 + 20, 0.5 * 3 - 2]
    assert output.extras["rm"].tolist() == [2.0, 3.0] and output.extras["b"].tolist() == [10.0, -1.0]
    assert output.extras["rm/member/1"].tolist() == [3.0, 3.0] and output.extras["rm/variance"].tolist() == [1.0, 0.0]
    assert CompositeReward([Fixed("a", 1.0, 2.0), Fixed("b", 1.0, 1.0)]).score(BATCH).scores.tolist() == [2.0, 3.0]


def test_a_column_that_fails_is_named():
    reward = CompositeReward([Fixed("a", 1.0, 2.0), Fixed("b", 1.0, float("nan"))], {"a": 1.0, "b": 0.0})
    with pytest.raises(RewardError, match="'b' returned a non-finite score"):  # even with weight 0
        reward.score(BATCH)


def test_spec(tmp_path):
    spec = {
        "type": "composite",
        "name": "quality",
        "rewards": [
            {"type": "classifier", "path": worlds.reward_folder(tmp_path), "name": "rm", "device": "cpu"},
            {"type": "rule", "function": f"{__name__}:length"},
            {"type": "verifier", "function": f"{__name__}:starts", "name": "form"},
        ],
        "weights": {"rm": 0.0, "length": -0.5, "form": 1},
    }
    check_reward(spec)
    output = build_reward(spec).score(RewardBatch(["w1 ", "w2 "], ["a", "w4"]))
    assert output.scores.tolist() == [0.5, -1.0] and set(output.extras) == {"rm", "length", "form"}
    nested = {"type": "ensemble", "aggregation": "mean", "members": [spec["rewards"][1], {**spec, "wieghts": {}}]}
    for function in (build_reward, check_reward):
        with pytest.raises(ConfigError, match="unknown key reward.members.1.wieghts of a composite .*: weights"):
            function(nested)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rewards": {"a": 1}}, "rewards: input should be a valid list"),
        ({"rewards": []}, "list should have at least 1 item"),
        ({"rewards": [length, length]}, "two of \\['length', 'length'\\] have the same name"),
        (
            {"rewards": [length, starts], "weights": {"length": 1}},
            "weights are for length; the rewards are length, starts",
        ),
        ({"rewards": [length], "weights": {"length": "one"}}, "weights.length: input should be a valid number"),
    ],
)
def test_specs_that_describe_nothing(options, message):
    with pytest.raises(ConfigError, match=message):
        build_reward({"type": "composite", **options})


def test_check_reward_loads_no_model(tmp_path):
    """What a dry run finds: keys and functions; a folder that is not there is found by its own section."""
    check_reward({"type": "classifier", "path": str(tmp_path / "nowhere")})
    check_reward({"type": "implicit", "path": str(tmp_path / "nowhere"), "reference": "x"})
    check_reward("some/model")
    for spec, message in (
        ("nowhere.py:f", "no file .*nowhere.py"),
        ({"type": "verifier", "function": f"{__name__}:strats"}, "no function 'strats' there; it has .*starts"),
        ({"type": "clasifier", "path": "x"}, "not 'clasifier'; nearest valid: classifier"),
        ({"type": "ensemble", "aggregation": "mean", "members": ["nowhere.py:f"]}, "no file .*nowhere.py"),
        ({"type": "ensemble", "aggregation": "uow", "members": ["a:b"]}, "unknown aggregation 'uow'"),
        ({"type": "ensemble", "aggregation": "uwo", "members": ["a:b"] * 2}, "uwo needs lambda"),
        ({"type": "ensemble", "aggregation": "mean", "path": str(tmp_path)}, "is not a saved ensemble"),
    ):
        with pytest.raises(AlignError, match=message):
            check_reward(spec)
