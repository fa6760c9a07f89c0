"""The specs and functions of docs/rewards.md are ones that the library takes."""

import re
from pathlib import Path

import yaml

from align.config.source import parse_value
from reward_models.base import RewardBatch
from reward_models.build import KEYS, build_reward
from reward_models.ensemble import save_ensemble
from reward_models.normalizer import Normalizer
from tests.reward_models import worlds
from trainers.reward import RewardConfig

DOCS = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", DOCS, re.DOTALL)


def test_every_spec_can_be_built(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rules = next(block for block in blocks("python") if "def brevity" in block)
    Path("my_rewards.py").write_text(rules)
    for name in ("reward", "reward_a", "reward_b", "reward_ensemble/member_0", "reward_ensemble/member_1"):
        Path("runs", name).mkdir(parents=True)
        worlds.reward_folder(Path("runs", name))
        Normalizer(0.0, 1.0, 10, "nothing").save(Path("runs", name))
    save_ensemble("runs/reward_ensemble", ["member_0", "member_1"])
    built = []
    for block in blocks("yaml"):
        content = yaml.safe_load(block)
        gold = [content["gold_reward"]] if "gold_reward" in content else []
        built += [build_reward(spec) for spec in content["rewards"] + gold]
    batch = RewardBatch(["w1 "], ["w2"], [[7]], [[8, 1]], columns={"answer": ["w2"]})
    assert len(built) == 5 and all(reward.score(batch).scores.shape == (1,) for reward in built)
    assert build_reward("my_rewards.py:contains_answer").score(batch).scores.tolist() == [1.0]


def test_what_is_named_exists():
    for key in KEYS["classifier"]:
        assert f"`{key}`" in DOCS
    for option in ("center_rewards_coefficient", "score_l2_coefficient", "normalizer_pairs"):
        assert option in DOCS and option in RewardConfig.__dataclass_fields__
    (example,) = blocks("json")
    assert Normalizer(**parse_value(example)).count == 4000
