"""Online DPO ranked by a judge and by the policy itself: what is trained on, and exact resumes."""

import pytest

from align.errors import ConfigError, RewardError
from align.reward_models import self_judge
from tests.trainers.on_policy.test_online_dpo import make
from tests.trainers.tiny_runs import assert_same, logged, parameters, prompts


def roses(prompts, first, second):
    count = [[text.count("r") for text in side] for side in (first, second)]
    return ["tie" if a == b else "first" if a > b else "second" for a, b in zip(*count, strict=True)]


def test_a_judge_ranks_as_the_count_that_it_judges_by(policy, tmp_path):
    """The win rates of a transitive judge order the completions as its count does, so the same pairs are trained on;
    evaluations, which draw one completion per prompt, show one half."""

    def count(completions, **columns):
        return [float(text.count("r")) for text in completions]

    found = []
    evaluated = {"eval_rows": prompts(4, seed=1), "eval_strategy": "steps", "eval_steps": 2, "gold_reward": count}
    for number, reward in enumerate((count, {"type": "judge", "function": roses})):
        trainer = make(policy, tmp_path / str(number), reward=reward, max_steps=2, **(evaluated if number else {}))
        trainer.train()
        found.append((parameters(trainer.model), logged(trainer, "pairs/without_signal")))
    assert_same(found[0][0], found[1][0])
    assert found[0][1] == found[1][1] and logged(trainer, "rewards/roses/consistent") == [1.0, 1.0]
    assert set(logged(trainer, "eval_proxy")) == {0.5} and 0 < logged(trainer, "rewards/roses/ties")[0] < 1
    with pytest.raises(ConfigError, match="gold_reward: roses is a judge"):
        make(policy, tmp_path / "gold", gold_reward={"type": "judge", "function": roses})
    within = {"type": "composite", "rewards": [{"type": "judge", "function": roses}]}
    with pytest.raises(ConfigError, match="gold_reward: roses is a judge"):
        make(policy, tmp_path / "gold", gold_reward=within)


def test_a_policy_that_judges_itself_within_a_composite_is_asked(policy, tmp_path, monkeypatch):
    monkeypatch.setattr(self_judge, "read_verdict", lambda text: len(text) % 3 / 2)
    found = []
    spec = {"type": "self_judge", "max_tokens": 2}
    for number, reward in enumerate((spec, {"type": "composite", "rewards": [spec]})):
        (tmp_path / "question.txt").write_text("{prompt} {first} , {second}")
        spec["template"] = str(tmp_path / "question.txt")
        trainer = make(policy, tmp_path / str(number), reward=reward, max_steps=1)
        trainer.train()
        found.append(parameters(trainer.model))
    assert_same(*found)


def test_a_policy_that_judges_itself_resumes_exactly(policy, tmp_path, monkeypatch):
    """Its words are read as a verdict here, which a tiny model does not write; else nothing is made up."""
    (tmp_path / "question.txt").write_text("{prompt} {first} , {second}")
    spec = {"type": "self_judge", "template": str(tmp_path / "question.txt"), "max_tokens": 2}
    with pytest.raises(RewardError, match="reward 'self_judge' failed for .* no verdict"):
        make(policy, tmp_path, reward=spec).train()
    monkeypatch.setattr(self_judge, "read_verdict", lambda text: len(text) % 3 / 2)

    def run(resume):
        trainer = make(policy, tmp_path, reward=spec, max_steps=3, save_strategy="steps", save_steps=2)
        trainer.train(resume_from_checkpoint=resume)
        return parameters(trainer.model), logged(trainer, "loss"), logged(trainer, "pairs/score_gap")

    whole, resumed = run(None), run(str(tmp_path / "checkpoint-2"))
    assert_same(whole[0], resumed[0])
    assert whole[1:] == resumed[1:] and 0 < whole[2][-1] <= 1
