"""Samples without a score are in no loss and in no baseline."""

import pytest
import torch

from align.data import toy
from align.errors import RewardError
from align.objectives.groups import group_relative, leave_one_out
from align.trainers.core.ranks import Ranks
from align.trainers.on_policy.evaluation import with_means
from align.trainers.on_policy.samples import Sample
from align.trainers.on_policy.streams import stream_scores
from align.trainers.weighting.base import FixedWeights, Weighting
from tests.trainers.tiny_runs import assert_same, logged, on_policy, parameters, prompts, tiny_model, wanted_words


def test_baselines_are_of_the_others():
    scores = torch.tensor([[1.0, 5.0, 3.0, 100.0], [2.0, -7.0, 0.0, 0.0]])
    kept = torch.tensor([[True, True, True, False], [True, False, False, False]])
    of_three = scores[:1, :3]
    for found, alone in (
        (leave_one_out(scores, kept), leave_one_out(of_three)),
        (group_relative(scores, kept=kept), group_relative(of_three)),
        (group_relative(scores, scale="none", kept=kept), group_relative(of_three, scale="none")),
    ):
        torch.testing.assert_close(found[:1, :3], alone)
        assert found[0, 3] == 0 and not found[1].any()  # an only sample has nothing to be compared with
    level = torch.full((1, 4), 1_000_000.1)
    assert not group_relative(level, kept=kept[:1]).any()


@pytest.mark.parametrize("scored", [0, 1, 2])
def test_advantages_of_few_scored_samples_are_numbers(scored, policy, tmp_path):
    """RLOO's deviation over a rollout of which one sample was scored was nan, and so was the loss."""
    sizes = {"max_steps": 1, "per_device_train_batch_size": 2}
    trainer_class, args = on_policy("rloo", tmp_path, normalize_advantages=True, **sizes)

    def few(completions):
        return [float(i) if i < scored else None for i in range(len(completions))]

    trainer = trainer_class(policy, few, args, prompts(8))
    trainer.train()
    assert (logged(trainer, "grad_norm")[0] > 0) == (scored == 2)


@pytest.mark.parametrize("method", ["grpo", "remax", "ppo"])
def test_what_is_left_out_does_not_matter(method, policy, tmp_path):
    """A sample whose reward failed has another reward's score, which cannot change anything."""

    def run(score):
        trainer_class, args = on_policy(method, tmp_path, num_generations=3, max_steps=2)
        seen = []

        def flaky(completions, log_metric, trainer_state):
            log_metric("seen_at", trainer_state.global_step)
            seen.extend(completions)
            scores = wanted_words(completions)
            return [float("nan") if len(c.split()) == 6 and i % 3 == 0 else s
                    for i, (c, s) in enumerate(zip(completions, scores, strict=True))]  # fmt: skip

        def other(completions):
            return [score if len(c.split()) == 6 and i % 3 == 0 else None for i, c in enumerate(completions)]

        rewards = [
            {"type": "rule", "function": flaky, "on_error": "mask", "max_error_share": 1.0},
            {"type": "rule", "function": other},
        ]
        trainer = trainer_class(policy, rewards, args, prompts(16))
        trainer.train()
        assert logged(trainer, "seen_at")[0] == 0.0
        assert 0 < logged(trainer, "rewards/flaky/failed")[0] < 1 and len(seen) > 0
        return parameters(trainer.model), [logged(trainer, key) for key in ("loss", "kl", "entropy", "grad_norm")]

    (one, logs), (two, others) = run(1.0), run(-50.0)
    assert logs == others
    assert_same(one, two)


HELD = {
    "constraints": [{"reward": "late", "direction": "at_least", "threshold": 0.5}],
    "multipliers": {"standardize": True},
}


@pytest.mark.parametrize(
    ("method", "options"),
    [("grpo", {"scale_rewards": "batch"}), ("rloo", HELD), ("remax", {}), ("reinforce_pp", {}), ("ppo", {})],
)
def test_a_rollout_without_any_score_trains_nothing(method, options, policy, tmp_path, caplog):
    def late(completions, trainer_state):
        trainer_state.max_steps = 1  # in a copy: it ends no run
        return [None if trainer_state.global_step == 0 else score for score in wanted_words(completions)]

    trainer_class, args = on_policy(method, tmp_path, **options)
    if method == "ppo":
        args.num_iterations = 1
    trainer = trainer_class(policy, late, args, prompts(16))
    trainer.train()
    trainer.close()
    said = [line for line in caplog.messages if "All reward functions returned None for the following kwargs" in line]
    assert len(said) == 1 and "'completion': " in said[0] and "'row': " in said[0]
    first, second, _ = trainer.state.log_history
    assert first["loss"] == first["grad_norm"] == 0 < second["grad_norm"]
    described = {"reward", "kl", "entropy", "remax/greedy_reward", "remax/advantage", "critic/explained_variance/late"}
    assert not described & first.keys() and second.keys() >= {"reward", "kl", "entropy"}


def test_evaluations_measure_all_samples(policy, tmp_path):
    """KL and entropy are the policy's, whatever the rewards have to say of its answers."""

    def some(completions):
        return [None if i % 2 else score for i, score in enumerate(wanted_words(completions))]

    measured = []
    for reward in (some, wanted_words):
        trainer_class, args = on_policy("grpo", tmp_path)
        trainer = trainer_class(policy, reward, args, prompts(16), prompts(6), ref_model=tiny_model(toy.tokenizer(), 1))
        found = trainer.evaluate()
        trainer.close()
        measured.append([found[f"eval_{name}"] for name in ("kl", "kl_k3", "entropy", "length")])
    assert measured[0] == measured[1] and measured[0][0] != 0


def test_a_weighting_that_needs_every_reward_says_so():
    class Needy(FixedWeights):
        needs_all = True

    sample = Sample({"row": 3}, [1], "x", [-1.0], False, 0, rewards={"a": 1.0})
    assert stream_scores(sample, FixedWeights(["a", "b"], [2.0, 1.0])) == {"task": 2.0}
    with pytest.raises(RewardError, match="reward b does not apply .* row 3 .*fixed reward_weights"):
        stream_scores(sample, Needy(["a", "b"], [2.0, 1.0]))
    assert Weighting.needs_all and Ranks().count == 1


def test_evaluations_take_the_mean_of_the_others():
    rows = [{"proxy": 1.0, "rewards/a": None}, {"proxy": None, "rewards/a": None}, {"proxy": 3.0, "rewards/a": None}]
    filled = with_means(rows, ["proxy", "rewards/a"])
    assert [row["proxy"] for row in filled] == [1.0, 2.0, 3.0] and filled[0]["rewards/a"] == 0.0
    with pytest.raises(RewardError, match="no proxy score"):
        with_means([{"proxy": None}], ["proxy"])
