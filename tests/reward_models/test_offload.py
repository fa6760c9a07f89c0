"""When a reward's models are on the device (on a GPU: tests/device/test_offload.py)."""

import pytest
import torch

from align.errors import ConfigError
from align.reward_models.base import RewardBatch
from align.reward_models.build import build_reward
from align.reward_models.offload import OnDevice
from align.reward_models.specs import parse_reward
from align.trainers.on_policy.rewards import gold_columns
from tests.reward_models import worlds


class Model:
    def __init__(self):
        self.places = []

    def to(self, device):
        self.places.append(device.type)


class OnGPU(OnDevice):
    device = torch.device("cuda", 0)

    def __init__(self):
        self.model = Model()

    def models(self):
        return [self.model]


def test_models_are_on_the_device_only_while_they_work():
    reward = OnGPU()
    with reward.working():
        assert reward.model.places == []
    reward.offload()
    assert reward.model.places == ["cpu"]
    with reward.working():
        assert reward.model.places == ["cpu", "cuda"]
    with pytest.raises(ValueError), reward.working():
        raise ValueError
    assert reward.model.places == ["cpu", "cuda", "cpu", "cuda", "cpu"]


def test_every_model_of_a_gold_reward_is_off_the_device_between_evaluations(tmp_path):
    paths = [worlds.reward_folder(tmp_path / str(i), seed=i) for i in range(2)]
    members = [{"type": "classifier", "path": path, "name": path[-1]} for path in paths]
    ensemble = {"type": "ensemble", "aggregation": "mean", "members": members}
    spec = {"type": "composite", "rewards": [ensemble, {"type": "length", "maximum": 1}]}
    (gold,) = gold_columns(spec, None).rewards
    assert [member.offloaded for member in gold.rewards[0].members] == [True, True]
    batch = RewardBatch(["w1 ", "w2 "], ["w7", "w8 w9"], completion_ids=[[1], [1]])
    assert torch.equal(gold.score(batch).scores, build_reward(spec).score(batch).scores)


def test_the_option(tmp_path):
    path = worlds.reward_folder(tmp_path)
    assert build_reward({"type": "classifier", "path": path, "offload": True}).offloaded
    assert not build_reward(path).offloaded
    with pytest.raises(ConfigError, match="offload of an ensemble belong to path"):
        parse_reward({"type": "ensemble", "aggregation": "mean", "members": [path], "offload": True})
