"""What a reward does to its inputs, no other reward and no trainer sees."""

import copy

from align.reward_models.base import RewardBatch
from align.reward_models.build import build_reward


def rude(prompts, completions, prompt_ids, completion_ids, tags) -> list[float]:
    scores = [float(len(turns[0]["content"])) for turns in completions]
    for turns in completions:
        turns[0]["content"] = "changed"
        turns.pop()
    for ids in (*prompt_ids, *completion_ids):
        ids.clear()
    tags[0].append("changed")
    tags[1]["a"]["b"] = 2
    prompts.clear()
    return scores


def polite(prompts, completions, completion_ids, tags) -> list[float]:
    return [float(len(turns[0]["content"])) for turns in completions]


def test_every_reward_gets_its_own_copies():
    batch = RewardBatch(
        [[{"role": "user", "content": "q"}]] * 2,
        [[{"role": "assistant", "content": "abc"}], [{"role": "assistant", "content": "de"}]],
        [[1, 2], [3]],
        [[4, 5, 6], [7]],
        {"tags": [["x"], {"a": {"b": 1}}]},
    )
    before = copy.deepcopy(batch)
    for order in ([rude, polite], [polite, rude]):
        rewards = [build_reward(function) for function in order]
        both = build_reward({"type": "composite", "rewards": rewards, "weights": {"rude": 1.0, "polite": 1.0}})
        assert both.score(batch).scores.tolist() == [6.0, 4.0]
        assert batch == before
