"""docs/architecture.md: the five parts that it adds, added and used."""

import math
import re
from pathlib import Path

import pytest
import torch

from align import build_reward
from align.errors import ConfigError, RolloutError
from align.objectives import preference
from align.objectives.preference_objective import preference_objective
from align.reward_models import specs
from align.reward_models.base import RewardBatch
from align.rollout import make, make_engine
from align.trainers.core.ranks import Ranks
from align.trainers.on_policy import estimators
from align.trainers.on_policy.streams import Stream
from align.trainers.rloo import RLOOConfig
from align.trainers.weighting.base import make_weighting
from align.trainers.weighting.sections import DYNAMIC_WEIGHTS
from tests.rollout.rollout_models import llama

PAGE = Path(__file__).parents[1] / "docs/architecture.md"


@pytest.fixture
def names(monkeypatch) -> dict:
    """What the page's blocks define; the tables that they add to are put back."""
    monkeypatch.setattr(preference, "LOSSES", losses := dict(preference.LOSSES))
    monkeypatch.setattr("align.objectives.preference_objective.LOSSES", losses)
    monkeypatch.setattr(make, "BACKENDS", dict(make.BACKENDS))
    tables = specs.REWARDS.kinds, estimators.ESTIMATORS, DYNAMIC_WEIGHTS.kinds
    before = [dict(table) for table in tables]
    found: dict = {"__name__": "architecture"}
    exec("\n".join(re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.S | re.M)), found)
    yield found
    for table, old in zip(tables, before, strict=True):
        table.clear()
        table.update(old)


def test_the_five_parts_work(names, tmp_path):
    logps, ref_logps = torch.tensor([[-1.0, -0.5], [-2.0, -1.0]]), torch.zeros(2, 2)
    objective = preference_objective(["exponential"], given={"beta": 0.5})
    losses = objective(objective.pairs(logps, torch.ones(2, 2), ref_logps)).losses
    torch.testing.assert_close(losses, torch.exp(torch.tensor([-0.75])))

    mask = torch.tensor([[1, 1], [1, 0]])
    stream = Stream("task", torch.tensor([1.0, 3.0]), None, 0.0, logps, ref_logps, mask)
    advantages = estimators.ESTIMATORS["centred"]().estimate(stream, Ranks()).advantages
    assert advantages.tolist() == [[-1.0, -1.0], [1.0, 0.0]]

    reward = build_reward({"type": "near_length", "target": 4})
    assert reward.score(RewardBatch(["?"] * 2, ["abcd", "abcdefgh"])).scores.tolist() == pytest.approx(
        [1, math.exp(-1)]
    )

    with pytest.raises(RolloutError, match="ends_at_once engine"):
        make_engine(llama(), backend="ends_at_once", max_model_len=64)

    section = {"type": "soft_worst", "sharpness": 50.0}
    args = RLOOConfig(output_dir=str(tmp_path), dynamic_weights=section, report_to="none", use_cpu=True)
    weighting = make_weighting({"a": 1.0, "b": 2.0}, args)
    assert weighting.scores({"a": 3.0, "b": 1.0})["task"] == pytest.approx(2.0, abs=0.02)
    with pytest.raises(ConfigError, match="unknown key dynamic_weights.sharpnes"):
        RLOOConfig(output_dir=str(tmp_path), dynamic_weights={"type": "soft_worst", "sharpnes": 1.0}, use_cpu=True)
