"""Completions that are cut at the limit, or come near it."""

import pytest
import torch
from trl.rewards import get_soft_overlong_punishment

from align.errors import ConfigError
from align.objectives.overlong import soft_overlong_punishment
from align.objectives.returns import gae
from align.rollout.types import Completion, Rollout, SamplingParams
from align.trainers.core.ranks import Ranks
from align.trainers.core.recorder import Recorder
from align.trainers.grpo import GRPO
from align.trainers.on_policy.pipeline import RolloutPipeline
from align.trainers.on_policy.rewards import RewardColumns
from align.trainers.on_policy.samples import Sample
from align.trainers.on_policy.streams import fill_advantages, make_streams
from align.trainers.on_policy.truncation import TruncationRule
from align.trainers.ppo import PPO, PPOConfig
from align.trainers.remax import ReMax
from align.trainers.rloo import RLOO, RLOOConfig
from align.trainers.weighting.base import FixedWeights, StreamSpec
from tests.trainers.tiny_runs import assert_same, logged, on_policy, on_policy_config, parameters, prompts, tiny_model

ALONE, PLAIN = Ranks(), FixedWeights(["good"], [2.0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"truncated": "drop"}, "truncated must be one of keep, mask, penalise, bootstrap"),
        ({"truncated": "penalise"}, "needs missing_eos_penalty"),
        ({"truncated": "mask", "missing_eos_penalty": 1.0}, "missing_eos_penalty does nothing with truncated: mask"),
        ({"missing_eos_penalty": -1.0}, "must be above 0, got -1"),
        ({"truncated": "bootstrap"}, "takes the value of a critic, which only PPO has"),
        ({"overlong_buffer": 7}, r"overlong_buffer must be 1 to max_completion_length \(6\) tokens, got 7"),
        ({"overlong_penalty": 0.5}, "needs overlong_buffer"),
    ],
)
def test_mistakes_are_told(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        on_policy_config(RLOOConfig, tmp_path, **options)


def test_what_follows_from_one_option(tmp_path):
    assert on_policy_config(RLOOConfig, tmp_path).truncated == "keep"
    assert on_policy_config(RLOOConfig, tmp_path, missing_eos_penalty=1.0).truncated == "penalise"
    assert on_policy_config(PPOConfig, tmp_path, truncated="bootstrap").truncated == "bootstrap"


def test_the_punishment_is_that_of_trl():
    theirs = get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=30)
    lengths = range(1, 110)
    ours = [soft_overlong_punishment(length, longest=100, buffer=30) for length in lengths]
    assert ours == pytest.approx(theirs([[0] * length for length in lengths]))
    assert ours[:70] == [0.0] * 70 and ours[84] == -0.5 and ours[99:] == [-1.0] * 10


class Written:
    """An engine whose completions of two prompts are known: the second sample of the first prompt is cut, and the
    greedy one of the second."""

    tells = draws_elsewhere = False

    def generate(self, prompts, params):
        def made(ids, cut):
            return Completion(ids, [-1.0] * len(ids), "length" if cut else "stop")

        sampled = [[made([1, 0], False), made([1, 2, 3, 4], True)], [made([2, 2, 0], False), made([3, 0], False)]]
        greedy = [[made([1, 1, 0], False)], [made([4, 4, 4, 4], True)]]
        found = iter(zip(sampled, greedy, strict=True))
        rows = [row for pair in found for row in pair] if len(params) == 4 else sampled
        return [Rollout(p, row, 0) for p, row in zip(prompts, rows, strict=True)]


def rolled_out(tokenizer, rule, greedy=False):
    requests = [SamplingParams(4, n=2), *([SamplingParams(4, temperature=0)] if greedy else [])]
    rewards = RewardColumns(
        {"type": "rule", "function": lambda completion_ids: [float(ids[0]) for ids in completion_ids], "name": "good"},
        [2.0],
    )
    pipeline = RolloutPipeline(Written(), tokenizer, rewards, requests, seed=0, recorder=Recorder(), truncation=rule)
    rows = [{"prompt": "a", "prompt_ids": [1, 1], "row": i} for i in range(2)]
    return pipeline.run(rows, [0, 1], 0, weight_version=0)


def advantages(rollout, estimator):
    fill_advantages(rollout, estimator, PLAIN, ALONE, 0.0)
    return [sample.advantages[0].item() for sample in rollout.samples]


def test_penalties_by_hand(tokenizer):
    """Scores 2 * the first token: 2, 2, 4, 6; the second sample is cut at 4 tokens and loses 3."""
    rule = TruncationRule("penalise", 3.0, longest=4)
    rollout = rolled_out(tokenizer, rule)
    assert [sample.score for sample in rollout.samples] == [2.0, -1.0, 4.0, 6.0]
    assert [sample.rewards["good"] for sample in rollout.samples] == [1.0, 1.0, 2.0, 3.0]  # as the reward said
    assert advantages(rollout, RLOO(2)) == [3.0, -3.0, -2.0, 2.0]
    assert advantages(rollout, GRPO(2, "none")) == [1.5, -1.5, -1.0, 1.0]
    # with ReMax the greedy answer of the second prompt is cut too: 8 - 3
    rollout = rolled_out(tokenizer, rule, greedy=True)
    assert advantages(rollout, ReMax(2, "none", 1.0, None)) == [0.0, -3.0, -1.0, 1.0]
    # tokens 3 and 4 of a buffer of 2 cost 0.25 and 0.5, and add to the other
    both = TruncationRule("penalise", 3.0, longest=4, overlong_buffer=2, overlong_penalty=0.5)
    assert [sample.score for sample in rolled_out(tokenizer, both).samples] == [2.0, -1.5, 3.75, 6.0]


def test_masks_by_hand(tokenizer):
    rule = TruncationRule("mask", longest=4)
    rollout = rolled_out(tokenizer, rule)
    assert [sample.left_out for sample in rollout.samples] == [False, True, False, False]
    assert advantages(rollout, RLOO(2)) == [0.0, 0.0, -2.0, 2.0]  # an only sample has no baseline
    rollout = rolled_out(tokenizer, rule, greedy=True)  # a cut greedy answer is no baseline
    assert [sample.masked for sample in rollout.samples] == [False, True, True, True]
    assert advantages(rollout, ReMax(2, "none", 1.0, None)) == [0.0] * 4


def test_a_penalty_is_part_of_the_task(tokenizer):
    class Two(FixedWeights):
        streams = [StreamSpec("task", kl=1.0, penalty=1.0), StreamSpec("held", kl=1.0)]

        def scores(self, rewards):
            return {"task": rewards["good"], "held": -rewards["good"]}

    rollout = rolled_out(tokenizer, TruncationRule("penalise", 3.0, longest=4))
    task, held = make_streams(rollout, Two(["good"], [1.0]), 0.0)
    assert task.scores.tolist() == [1.0, -2.0, 2.0, 3.0] and held.scores.tolist() == [-1.0, -1.0, -2.0, -3.0]


def test_constraints_never_turn_a_penalty_into_a_gain():
    """Whatever the multipliers are: the penalty is in the task's stream alone, or refused."""
    from align.trainers.weighting.constrained import ConstrainedWeights, RewardStreams
    from align.trainers.weighting.dynamic import GradientWeights
    from align.trainers.weighting.sections import GradientSection
    from tests.trainers.weighting.test_net_weights import make

    rule = TruncationRule("penalise", 1.0, longest=4)
    both = {"directions": ["at_most"] * 2, "weights": [1.0, 1.0], "kl_in_constraints": True}
    held = make(ConstrainedWeights, task=["a", "b"], **both)
    rule.check(held)
    assert [stream.penalty for stream in held.streams] == [1.0, 0.0, 0.0]
    rule.check(weights := GradientWeights(["a", "b"], [1.0, 3.0], GradientSection(type="gradient")))
    assert sum(w * s.penalty for w, s in zip(weights.weights(), weights.streams, strict=True)) == 1.0
    for weighting in (make(RewardStreams, task=["a", "b"], **both), make(ConstrainedWeights, task=None, **both)):
        with pytest.raises(ConfigError, match="name task_rewards"):
            rule.check(weighting)
        TruncationRule("mask").check(weighting)


def test_a_value_takes_the_place_of_a_cut_score(tokenizer):
    """lambda 1: the advantage of a finished one is score - V, of the cut one its last value - V, with gamma 0.5
    between the tokens."""
    rollout = rolled_out(tokenizer, TruncationRule("bootstrap", longest=4, overlong_buffer=1, overlong_penalty=0.5))
    for sample in rollout.samples:
        sample.values = torch.full((sample.length, 1), 0.25)
        sample.bootstrap = torch.tensor([8.0]) if sample.truncated else None
    fill_advantages(rollout, PPO(gamma=0.5, lam=1.0, whiten_advantages=False), PLAIN, ALONE, 0.0)
    finished, cut = rollout.samples[:2]
    assert finished.returns[:, 0].tolist() == [1.0, 2.0]
    assert cut.returns[:, 0].tolist() == [0.4375, 0.875, 1.75, 3.5]  # 0.5 * 8 - 0.5 at the last token
    values, rewards, mask = torch.zeros(1, 3), torch.tensor([[1.0, 1.0, 9.0]]), torch.tensor([[1.0, 1.0, 0.0]])
    found, _ = gae(rewards, values, mask, gamma=1.0, lam=0.0, last_values=torch.tensor([4.0]))
    assert found.tolist() == [[1.0, 5.0, 0.0]]  # not the token outside the mask


@pytest.mark.parametrize("batching", ["shared_prefix", "padded"])
def test_the_value_after_the_last_token(policy, tmp_path, batching):
    """It is what the critic says of the state before one more token."""
    trainer_class, args = on_policy("ppo", tmp_path, truncated="bootstrap", batching=batching)
    trainer = trainer_class(policy, lengths, args, prompts(8))
    torch.nn.init.normal_(trainer.critic.model.head.weight)

    def samples(more):
        rows = [trainer.train_dataset[i % 2] for i in range(3)]
        ids = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
        return [Sample(row, i + more, "x", [], n != 1, 0) for n, (row, i) in enumerate(zip(rows, ids, strict=True))]

    cut, longer = samples([]), samples([20])
    trainer.forward.fill_values([cut], trainer.critic.values)
    trainer.forward.fill([longer], "values", trainer.critic.values)
    for one, other in zip(cut, longer, strict=True):
        torch.testing.assert_close(one.values, other.values[:-1])
        if one.truncated:
            torch.testing.assert_close(one.bootstrap, other.values[-1])
    assert cut[1].bootstrap is None


def lengths(completions):
    return [len(text.split()) / 6 for text in completions]


@pytest.mark.parametrize("method", ["grpo", "ppo"])
def test_what_is_cut_does_not_matter_when_masked(method, policy, tokenizer, tmp_path):
    end = tokenizer.eos_token_id

    def run(score):
        def reward(completions, completion_ids):
            return [
                score if len(ids) == 6 and ids[-1] != end else x
                for ids, x in zip(completion_ids, lengths(completions), strict=True)
            ]

        more = {"num_generations": 3, "loss_aggregation": "token_mean", "tokens_per_batch": 60}
        trainer_class, args = on_policy(method, tmp_path, max_steps=2, truncated="mask", **more)
        trainer = trainer_class(policy, reward, args, prompts(16))
        trainer.train()
        assert 0 < logged(trainer, "completions/clipped_ratio")[0] <= logged(trainer, "completions/masked_ratio")[0]
        return parameters(trainer.model), [logged(trainer, key) for key in ("loss", "kl", "entropy", "grad_norm")]

    (one, logs), (two, others) = run(1.0), run(-50.0)
    assert logs == others and any(logs[0])
    assert_same(one, two)


@pytest.mark.parametrize("method", ["rloo", "ppo"])
def test_a_step_of_cut_completions_alone_changes_nothing(method, tokenizer, tmp_path, caplog):
    """And says so."""
    trainer_class, args = on_policy(
        method, tmp_path, max_steps=1, truncated="mask", max_completion_length=1, weight_decay=0.0
    )
    model = tiny_model(tokenizer)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] = 0.0
        model.model.norm.weight.mul_(30.0)  # so that words are far more likely than the end
    trainer = trainer_class(model, lengths, args, prompts(8), processing_class=tokenizer)
    before = parameters(trainer.model)
    trainer.train()
    assert logged(trainer, "completions/masked_ratio") == [1.0]
    assert_same(before, parameters(trainer.model))
    assert "step 1: all samples are left out of the loss" in caplog.text
