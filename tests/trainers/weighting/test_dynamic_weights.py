"""Weights of rewards that follow the hypervolume or the objectives' gradients, while a tiny policy trains."""

import math

import pytest
import torch

from align.data import toy
from align.errors import ConfigError, TrainingError
from align.objectives.policy_loss import aggregate_tokens
from align.trainers.on_policy.batches import collate, split_by_length
from align.trainers.weighting.dynamic import HypervolumeWeights
from tests.trainers.on_policy.enumerable import rolled_out
from tests.trainers.tiny_runs import assert_same, logged, on_policy, parameters, prompts, wanted_words

EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 16, "eval_on_start": True}


def polite(completions, **columns) -> list[float]:
    return [float(any(word in toy.POLITE for word in text.split())) for text in completions]


def long(completions, **columns) -> list[float]:
    return [float(len(text.split())) for text in completions]


def make(method, policy, folder, kind, *rewards, **options):
    settings = {
        "num_generations": 4, "per_device_train_batch_size": 8, "max_completion_length": 4, "learning_rate": 5e-3,
        "beta": 0.1, "kl_in": "reward", **(EVALUATED if kind == "hypervolume" else {}), **options,
    }  # fmt: skip
    settings["dynamic_weights"] = {"type": kind, **settings.get("dynamic_weights", {})}
    cls, args = on_policy(method, folder, **settings)
    return cls(policy, list(rewards) or [polite, wanted_words], args, prompts(64), prompts(16, seed=1))


# ---- hypervolume ----------------------------------------------------------------------------------------------------


def test_the_multiplier_follows_the_volume_that_an_evaluation_adds():
    weights = HypervolumeWeights(["a", "b"], [1.0, -2.0])
    start = {"a": [0.0, 2.0], "b": [5.0, 11.0]}  # means 1 and 8, deviations 1 and 3; b is better when smaller
    assert weights.observe(start) == {"hypervolume_gain": 0.0} and weights.multiplier == 1.0
    better = {"a": [1.5, 1.5], "b": [6.5, 6.5]}  # by 0.5 of each deviation
    assert weights.observe(better)["hypervolume_gain"] == pytest.approx(0.25)
    assert weights.multiplier == pytest.approx(0.5 + 1.5 * math.tanh(0.25))
    assert weights.scores({"a": 1.0, "b": 3.0})["task"] == pytest.approx(weights.multiplier * (1.0 - 6.0))
    assert weights.observe(better)["hypervolume_gain"] == 0 and weights.multiplier == 0.5  # nothing new
    again = HypervolumeWeights(["a", "b"], [1.0, -2.0])
    again.load_state_dict(weights.state_dict())
    best = {"a": [2.0, 2.0], "b": [5.0, 5.0]}
    assert again.observe(best) == weights.observe(best) == {"hypervolume_gain": pytest.approx(0.75)}


def test_units_do_not_matter():
    gains = []
    for unit in (1.0, 1000.0):
        weights = HypervolumeWeights(["a", "b"], [1.0, 1.0])
        for a, b in ((0.0, 1.0), (0.5, 1.5), (0.3, 2.0)):
            found = weights.observe({"a": [a - 1, a + 1], "b": [unit * (b - 2), unit * (b + 1)]})
        gains.append(found["hypervolume_gain"])
    assert gains[0] == pytest.approx(gains[1]) and gains[0] > 0


def test_a_run_is_scaled_by_its_multiplier_and_resumes_exactly(policy, tmp_path):
    def run(resume):
        options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5}
        trainer = make("rloo", policy, tmp_path, "hypervolume", **options)
        trainer.train(tmp_path / "checkpoint-2" if resume else None)
        return trainer

    whole, resumed = run(False), run(True)
    used = logged(whole, "dynamic_weights/multiplier")
    assert used[0] == 1.0 and len(set(used)) > 2 and used == logged(resumed, "dynamic_weights/multiplier")
    gains = logged(whole, "eval_hypervolume_gain")
    assert used[1:] == pytest.approx([0.5 + 1.5 * math.tanh(g) if any(gains[: i + 2]) else 1.0
                                      for i, g in enumerate(gains[1:5])])  # fmt: skip
    assert_same(parameters(whole.model), parameters(resumed.model))


@pytest.mark.parametrize(
    ("method", "options"),
    [("grpo", {}), ("grpo", {"scale_rewards": "batch"}), ("reinforce_pp", {}), ("ppo", {})],
)
def test_a_factor_that_the_estimator_cancels_is_refused(method, options, policy, tmp_path):
    with pytest.raises(ConfigError, match="from which it cancels: nothing would change"):
        make(method, policy, tmp_path, "hypervolume", **options)


@pytest.mark.parametrize(
    ("method", "options"),
    [("rloo", {}), ("remax", {}), ("grpo", {"scale_rewards": "none"}), ("ppo", {"whiten_advantages": False})],
)
def test_where_it_is_allowed_the_factor_scales_the_advantages(method, options, policy, tmp_path):
    trainer = make(method, policy, tmp_path, "hypervolume", **options)
    plain, _ = rolled_out(trainer)
    trainer.weighting.multiplier = 1.7
    scaled, _ = rolled_out(trainer)
    for a, b in zip(plain, scaled, strict=True):  # the KL is 0 in the first rollout
        torch.testing.assert_close(1.7 * a.advantages, b.advantages, rtol=1e-4, atol=1e-5)


# ---- gradients ------------------------------------------------------------------------------------------------------


def test_gradients_are_those_of_each_reward(policy, tmp_path):
    """By one backward pass of the whole rollout per reward; micro-batches do not matter."""
    trainer = make("rloo", policy, tmp_path, "gradient")
    trainer.model.requires_grad_(True)
    samples, _ = rolled_out(trainer, 8)
    gradients = trainer.stream_gradients(split_by_length(samples, 3))
    batch = collate(samples, trainer.planner.pad_token_id)
    for i in range(2):
        trainer.model.zero_grad()
        losses = -batch["advantages"][..., i + 1] * trainer.forward.policy_logps(trainer.model)(batch)
        aggregate_tokens(losses, batch["completion_mask"], "sequence_sum", torch.tensor(len(samples))).backward()
        expected = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
        torch.testing.assert_close(gradients[i], expected, rtol=1e-4, atol=1e-6)


def test_weights_move_to_the_reward_with_the_largest_influence(policy, tmp_path):
    options = {"dynamic_weights": {"learning_rate": 1.0, "mu": 100.0, "parameters": "lm_head"}, "max_steps": 6}
    trainer = make("rloo", policy, tmp_path, "gradient", reward_weights=[1.0, 3.0], **options)
    assert trainer.weighting.weights() == [1.0, 0.25, 0.75]
    trainer.train()
    weights = torch.tensor([logged(trainer, f"dynamic_weights/{n}") for n in ("polite", "wanted_words")])
    influence = torch.tensor(
        [logged(trainer, f"dynamic_weights/influence/{n}") for n in ("polite", "wanted_words")], dtype=torch.float64
    )
    assert torch.allclose(weights.sum(0), torch.ones(6))
    expected = torch.tensor([0.25, 0.75], dtype=torch.float64)
    for step in range(6):
        expected = torch.softmax(expected.log() + 0.01 * influence[:, step], dim=0)
        assert torch.allclose(weights[:, step].double(), expected, rtol=1e-3)
    assert (weights[0, -1] > 0.25) == (influence[0].sum() > influence[1].sum()) and weights[0, -1] != 0.25


def test_gradient_weights_resume_exactly(policy, tmp_path):
    def run(resume):
        options = {"dynamic_weights": {"learning_rate": 1.0, "mu": 100.0}, "save_strategy": "steps", "save_steps": 2}
        trainer = make("reinforce_pp", policy, tmp_path, "gradient", max_steps=4, **options)
        trainer.train(tmp_path / "checkpoint-2" if resume else None)
        return parameters(trainer.model), logged(trainer, "dynamic_weights/polite")[-2:]

    whole, resumed = run(False), run(True)
    assert_same(whole[0], resumed[0])
    assert whole[1] == resumed[1]


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("volume", {}, "type must be one of hypervolume, gradient, not 'volume'"),
        (
            "hypervolume",
            {"dynamic_weights": {"mu": 1.0}},
            "dynamic_weights.mu is an option of type gradient, not of type hyper",
        ),
        ("hypervolume", {"eval_strategy": "no"}, "learns from evaluations: set eval_strategy"),
        ("hypervolume", {"reward_weights": [1.0, 0.0]}, "at least two rewards with a weight, got 1"),
        ("gradient", {"reward_weights": [1.0, -1.0]}, "reward_weights above 0 of at least two rewards"),
        ("gradient", {"dynamic_weights": {"mu": 0}}, "dynamic_weights.mu: input should be greater than 0"),
        ("gradient", {"dynamic_weights": {"parameters": "h.(1"}}, "'h..1' is no regular expression: missing"),
        (
            "gradient",
            {"constraints": [{"reward": "polite", "direction": "equal", "threshold": 0.5}]},
            "both decide the weights",
        ),
    ],
)
def test_what_does_not_fit_is_refused(kind, options, message, policy, tmp_path):
    with pytest.raises(ConfigError, match=message):
        make("rloo", policy, tmp_path, kind, **options)


def test_what_cannot_be_measured_is_an_error(policy, tmp_path):
    def constant(completions, **columns):
        return [1.0] * len(completions)

    with pytest.raises(TrainingError, match="constant is the same for every prompt of the first evaluation"):
        make("rloo", policy, tmp_path, "hypervolume", polite, constant).train()
    trainer = make("rloo", policy, tmp_path, "gradient", dynamic_weights={"parameters": "no_such_layer"})
    with pytest.raises(ConfigError, match="no trained parameter's name has 'no_such_layer'"):
        trainer.train()
