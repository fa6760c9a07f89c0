"""Reward models that are on the GPU only while they score."""

import torch

from align.reward_models.base import RewardBatch
from align.reward_models.build import build_reward
from tests.reward_models import worlds


def on_gpu() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def test_the_device_is_given_back(device, tmp_path):
    folder = worlds.reward_folder(tmp_path)
    batch = RewardBatch(["w1 w2 ", "w3 "], ["w7", "w8 w9"])
    expected = build_reward({"type": "classifier", "path": folder}).score(batch).scores
    before = on_gpu()
    reward = build_reward({"type": "classifier", "path": folder, "offload": True})
    for _ in range(2):
        assert torch.equal(reward.score(batch).scores, expected)
        assert on_gpu() == before and all(p.device.type == "cpu" for p in reward.model.parameters())
    assert reward.device.type == device
