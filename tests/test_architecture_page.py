"""docs/architecture.md: the five parts that it adds, added and used."""

import math
import re
from pathlib import Path

import pytest
import torch

from align import build_reward
from align.errors import RolloutError
from align.objectives import preference
from align.objectives.preference_objective import preference_objective
from align.reward_models import specs
from align.reward_models.base import RewardBatch
from align.rollout import make, make_engine
from align.trainers.core.ranks import Ranks
from align.trainers.on_policy import estimators
from align.trainers.on_policy.streams import Stream
from tests.rollout.rollout_models import llama

PAGE = Path(__file__).parents[1] / "docs/architecture.md"


@pytest.fixture
def names(monkeypatch) -> dict:
    """What the page's blocks define; the tables that they add to are put back."""
    monkeypatch.setattr(preference, "LOSSES", tables := dict(preference.LOSSES))
    monkeypatch.setattr("align.objectives.preference_objective.LOSSES", tables)
    monkeypatch.setattr(make, "BACKENDS", dict(make.BACKENDS))
    before = dict(specs.REWARDS.kinds), dict(estimators.ESTIMATORS)
    found: dict = {"__name__": "architecture"}
    exec("\n".join(re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.S | re.M)), found)
    yield found
    for table, old in zip((specs.REWARDS.kinds, estimators.ESTIMATORS), before, strict=True):
        table.clear()
        table.update(old)


def test_the_five_parts_work(names):
    logps, ref_logps = torch.tensor([[-1.0, -0.5], [-2.0, -1.0]]), torch.zeros(2, 2)
    objective = preference_objective(["exponential"], given={"beta": 0.5})
    losses = objective(objective.pairs(logps, torch.ones(2, 2), ref_logps)).losses
    torch.testing.assert_close(losses, torch.exp(torch.tensor([-0.75])))

    mask = torch.tensor([[1, 1], [1, 0]])
    stream = Stream("task", torch.tensor([1.0, 3.0]), None, 0.0, logps, ref_logps, mask)
    advantages = estimators.ESTIMATORS["centred"]().estimate(stream, Ranks()).advantages
    assert advantages.tolist() == [[-1.0, -1.0], [1.0, 0.0]]

    reward = build_reward({"type": "length", "target": 4})
    assert reward.score(RewardBatch(["?"] * 2, ["abcd", "abcdefgh"])).scores.tolist() == pytest.approx(
        [1, math.exp(-1)]
    )

    with pytest.raises(RolloutError, match="ends_at_once engine"):
        make_engine(llama(), backend="ends_at_once", max_model_len=64)

    weighting = names["WorstReward"](["a", "b"], [1.0, 2.0])
    assert weighting.scores({"a": 3.0, "b": 1.0}) == {"task": 2.0}
