"""Constrained training on a tiny world: estimators of every kind meet thresholds; what cannot be met is said."""

import logging

import pytest
import torch

from align.data import toy
from align.errors import ConfigError
from tests.trainers.on_policy.enumerable import rolled_out
from tests.trainers.tiny_runs import assert_same, logged, on_policy, parameters, prompts, wanted_words

EQUAL = [{"reward": "polite", "direction": "equal", "threshold": 0.6}]
AT_LEAST = [{"reward": "polite", "direction": "at_least", "threshold": 0.6}]
BOTH = [
    {"reward": "polite", "direction": "at_least", "threshold": 0.3},
    {"reward": "wanted_words", "direction": "at_most", "threshold": 0.2},
]


def polite(completions, **columns) -> list[float]:
    return [float(any(word in toy.POLITE for word in text.split())) for text in completions]


def constant(completions, **columns) -> list[float]:
    return [0.25] * len(completions)


def make(method, policy, folder, *rewards, **options):
    settings = {"max_steps": 2, "num_generations": 2, "per_device_train_batch_size": 8, "beta": 0.1, **options}
    kind, args = on_policy(method, folder, **settings)
    return kind(policy, list(rewards) or [polite], args, prompts(64))


def late(trainer, key):
    """Mean over the last third of the run."""
    values = logged(trainer, key)
    return sum(values[-len(values) // 3 :]) / len(values[-len(values) // 3 :])


# ---- thresholds are met ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "constraints", "multipliers"),
    [
        ("remax", EQUAL, {"pid": {"kp": 3.0, "ki": 0.3}}),
        ("rloo", AT_LEAST, {"learning_rate": 1.0}),
        ("ppo", EQUAL, {"pid": {"kp": 3.0, "ki": 0.3}}),
    ],
)
def test_thresholds_are_met(method, constraints, multipliers, policy, tmp_path):
    """The policy starts at 0.15; at_least is not overshot either, because the task is the KL."""
    options = {"num_iterations": 2, "critic_learning_rate": 1e-3} if method == "ppo" else {}
    steps = {"remax": 42, "rloo": 84, "ppo": 60}[method]  # plain descent on the multiplier overshoots for 50 steps
    trainer = make(
        method, policy, tmp_path, constraints=constraints, multipliers=multipliers, max_steps=steps,
        per_device_train_batch_size=32, num_generations=4, max_completion_length=4, learning_rate=3e-3, **options,
    )  # fmt: skip
    trainer.train()
    name = f"constraints/polite_{constraints[0]['direction']}"
    assert logged(trainer, f"{name}/value")[0] < 0.25
    assert late(trainer, f"{name}/value") == pytest.approx(0.6, abs=0.1)
    assert logged(trainer, f"{name}/weight")[0] > late(trainer, f"{name}/weight") > 0


def test_satisficing_aims_at_the_threshold_and_the_released_form_does_not(policy, tmp_path):
    """The policy is polite in 0.15 of its answers. The penalty of each episode is linear in that share, with a slope
    that pushes it to 0 for a threshold of 0.4; the penalty of the mean pulls it to 0.4."""
    found = {}
    for form, rate in (("squared", 2.0), ("squared_per_episode", 5.0)):
        trainer = make(
            "rloo", policy, tmp_path, constraints=[{**EQUAL[0], "threshold": 0.4}],
            multipliers={"form": form, "coefficients": rate}, max_steps=30, per_device_train_batch_size=32,
            num_generations=4, max_completion_length=4, learning_rate=3e-3, beta=0.01,
        )  # fmt: skip
        trainer.train()
        found[form] = late(trainer, "constraints/polite_equal/value")
    assert found["squared"] == pytest.approx(0.4, abs=0.1)
    assert found["squared_per_episode"] < 0.1


# ---- streams and weights --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["remax", "rloo", "grpo"])
def test_every_column_has_its_own_baseline(method, policy, tmp_path):
    """Advantages per stream are those of a run on that reward alone; the KL is the task's only."""
    options = {"kl_in": "reward", "beta": 0.3}
    trainer = make(method, policy, tmp_path, polite, wanted_words, constraints=BOTH, **options)
    samples, _ = rolled_out(trainer)
    assert [stream.name for stream in trainer.weighting.streams] == ["task", "polite_at_least", "wanted_words_at_most"]
    for index, reward in ((1, polite), (2, wanted_words)):
        alone, _ = rolled_out(make(method, policy, tmp_path, reward, **{**options, "beta": 0.0}))
        for sample, other in zip(samples, alone, strict=True):
            assert sample.completion_ids == other.completion_ids
            torch.testing.assert_close(sample.advantages[:, index], other.advantages[:, 0])
    assert any(sample.advantages[:, 1].abs().max() > 0 for sample in samples)


def test_task_rewards_and_the_kl_in_every_stream(policy, tmp_path):
    """All-PPO: the rewards are maximised as long as none is above its threshold."""
    held = [{**BOTH[1], "reward": name} for name in ("polite", "wanted_words")]
    options = {"constraints": held, "task_rewards": ["polite", "wanted_words"], "reward_weights": [0.5, 2.0]}
    trainer = make("rloo", policy, tmp_path, polite, wanted_words, **options)
    row = {"polite": 1.0, "wanted_words": 0.25}
    assert trainer.weighting.scores(row) == {"task": 1.0, "polite_at_most": 1.0, "wanted_words_at_most": 0.25}
    assert trainer.weighting.weights() == [1.0, -0.5, -0.5]
    everywhere = make(
        "rloo", policy, tmp_path, polite, wanted_words, multipliers={"kl_in_constraints": True}, **options
    )
    for one in (trainer, everywhere):
        one.reference.model.lm_head.weight.data.mul_(0.5)  # a KL
    plain, with_kl = (rolled_out(one)[0] for one in (trainer, everywhere))
    gaps = [(a.advantages - b.advantages).abs().amax(0) for a, b in zip(with_kl, plain, strict=True)]
    gap = torch.stack(gaps).amax(0)
    assert gap[0] == 0 and gap[1] > 1e-3 and gap[2] > 1e-3


def test_streams_are_standardised_before_they_are_mixed(policy, tmp_path):
    """A scale of a reward then cancels, as does the KL coefficient."""
    options = {"constraints": AT_LEAST, "multipliers": {"standardize": True}}
    samples, _ = rolled_out(make("rloo", policy, tmp_path, **options))
    tokens = torch.cat([sample.advantages for sample in samples])
    assert tokens[:, 1].mean().item() == pytest.approx(0, abs=1e-5)
    assert tokens[:, 1].std().item() == pytest.approx(1, abs=1e-4)


def test_the_kl_in_the_loss_is_weighed_as_a_part_of_the_task(policy, tmp_path):
    """With a multiplier at its upper bound the task has next to no weight, wherever the KL is."""
    for kl_in, weight in (("reward", 6.0), ("loss", 6.0), ("loss", -6.0)):
        trainer = make(
            "rloo", policy, tmp_path, constant, constraints=[{**AT_LEAST[0], "reward": "constant"}], kl_in=kl_in,
            multipliers={"initial": weight, "learning_rate": 0.0}, beta=5.0, max_steps=1,
        )  # fmt: skip
        trainer.check_start = False
        trainer.reference.model.lm_head.weight.data.mul_(0.5)  # a KL
        trainer.train()
        (norm,) = logged(trainer, "grad_norm")
        assert (norm < 0.5) == (weight > 0), (kl_in, weight, norm)


def test_the_estimator_weighs_episodes_or_tokens(policy, tmp_path):
    for estimator in ("episode_mean", "token_mean"):
        trainer = make("rloo", policy, tmp_path, constraints=AT_LEAST, multipliers={"estimator": estimator})
        columns, lengths = {"polite": torch.tensor([1.0, 0.0])}, torch.tensor([6.0, 2.0])
        logs = trainer.weighting.update(columns, lengths)
        assert logs["constraints/polite_at_least/value"] == {"episode_mean": 0.5, "token_mean": 0.75}[estimator]


# ---- what is logged and said ----------------------------------------------------------------------------------------


def test_every_number_of_a_constraint_is_logged(policy, tmp_path):
    trainer = make("rloo", policy, tmp_path, polite, wanted_words, constraints=BOTH, max_steps=3)
    trainer.train()
    for entry in trainer.state.log_history[:3]:
        task = entry["constraints/task_weight"]
        for name, sign in (("polite_at_least", 1), ("wanted_words_at_most", -1)):
            found = {key.rpartition("/")[2]: value for key, value in entry.items() if f"/{name}/" in key}
            assert set(found) == {"value", "threshold", "violation", "raw", "multiplier", "weight", "saturated"}
            assert found["weight"] == pytest.approx(sign * found["multiplier"])
            assert found["multiplier"] == pytest.approx(torch.sigmoid(torch.tensor(found["raw"])).item())
            assert found["violation"] == pytest.approx(max(0.0, sign * (found["threshold"] - found["value"])))
            assert found["value"] == pytest.approx(entry[f"rewards/{name.partition('_at')[0]}"])
            task += found["multiplier"]
        assert task == pytest.approx(2)


def test_an_infeasible_threshold_is_reported(policy, tmp_path, caplog):
    caplog.set_level(logging.WARNING, logger="align.trainers")
    trainer = make(
        "rloo", policy, tmp_path, constraints=[{**AT_LEAST[0], "threshold": 1.4}], max_steps=30,
        multipliers={"learning_rate": 20.0}, per_device_train_batch_size=4, max_completion_length=2,
    )  # fmt: skip
    trainer.train()
    found = [record.getMessage() for record in caplog.records if "multiplier at its limit" in record.getMessage()]
    assert len(found) == 1  # 25 updates; again at 50
    assert "polite at_least 1.4 was violated in each of the last 25 updates (now " in found[0]
    assert "raw multiplier 6" in found[0] and "task 0.00" in found[0] and "cannot be reached" in found[0]


def test_a_reward_without_variance_is_reported(policy, tmp_path, caplog):
    caplog.set_level(logging.WARNING, logger="align.trainers")
    trainer = make("remax", policy, tmp_path, constant, wanted_words, max_steps=12, max_completion_length=2)
    trainer.train()
    found = [record.getMessage() for record in caplog.records if "nothing can be learned" in record.getMessage()]
    assert len(found) == 1 and found[0].startswith("step 10: reward 'constant' gave all 16 completions")


def test_constraints_without_a_task_are_reported(policy, tmp_path):
    """Every reward is held and no KL counts: mu-PPO with GRPO's usual beta of 0."""
    said = [make("rloo", policy, tmp_path, constraints=AT_LEAST, beta=b).weighting.messages for b in (0.0, 0.1)]
    assert "nothing keeps the policy near the reference" in said[0][0] and said[1] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"constraints": [{**EQUAL[0], "reward": "politeness"}]}, "constraints name politeness, and the rewards are p"),
        ({"constraints": [{"reward": "polite", "threshold": 1}]}, "constraints.0: a constraint needs 'direction'"),
        (
            {"constraints": [{**EQUAL[0], "threshold": "high"}]},
            "constraints.0.threshold: input should be a valid",
        ),
        ({"constraints": EQUAL, "multipliers": {"speed": 1}}, "unknown key multipliers.speed of form sigmoid, tanh or"),
        (
            {"constraints": EQUAL, "multipliers": {"estimator": "median"}},
            "estimator: input should be 'episode_mean'",
        ),
        ({"constraints": EQUAL, "multipliers": {"form": "relu"}}, "form must be one of sigmoid, tanh, softplus, squar"),
        ({"constraints": EQUAL, "multipliers": {"pid": {}, "momentum": 0.2}}, "momentum would be ignored beside pid"),
        ({"constraints": EQUAL, "multipliers": {"pid": {"kq": 1}}}, "unknown key multipliers.pid.kq; valid: kp, ki"),
        ({"constraints": EQUAL, "multipliers": {"bounds": [1]}}, "bounds must be .smallest, largest. raw value"),
        ({"constraints": AT_LEAST, "multipliers": {"form": "squared"}}, "aim at thresholds: polite must be `equal`"),
        (
            {"constraints": EQUAL, "multipliers": {"form": "squared", "pid": {}}},
            "multipliers.pid is an option of form sigmoid and tanh and softplus, not of form squared",
        ),
        ({"constraints": EQUAL, "multipliers": {"form": "squared", "coefficients": [1, 2]}}, "one per constraint"),
        ({"constraints": EQUAL * 2, "multipliers": {"form": "squared"}}, "polite equal"),
        ({"constraints": EQUAL, "multipliers": {"pid": {"kp": -1}}}, "kp: input should be greater than or equal to 0"),
        ({"multipliers": {"form": "tanh"}}, "multipliers is set, and there are no constraints"),
        ({"task_rewards": ["polite"]}, "task_rewards is set, and there are no constraints"),
        ({"constraints": EQUAL, "task_rewards": ["words"]}, "task_rewards name words, and the rewards are polite"),
        ({"constraints": EQUAL, "multipliers": {"kl_in_constraints": True}, "kl_in": "loss"}, "needs kl_in: reward"),
        ({"constraints": EQUAL, "multipliers": {"kl_in_constraints": True}, "beta": 0.0}, "reward and a beta above 0"),
        ({"constraints": EQUAL, "dynamic_sampling_rounds": 2}, "always or never right is not among them"),
    ],
)
def test_what_does_not_fit_is_refused(options, message, policy, tmp_path):
    with pytest.raises(ConfigError, match=message):
        make("rloo", policy, tmp_path, **options)


def test_an_option_that_changes_nothing_is_refused(policy, tmp_path):
    options = {"constraints": EQUAL, "multipliers": {"standardize": True}}
    for method in ("ppo", "reinforce_pp"):
        with pytest.raises(ConfigError, match="standardize changes nothing here"):
            make(method, policy, tmp_path, **options)
    with pytest.raises(ConfigError, match="wanted_words is neither constrained nor among task_rewards"):
        make("rloo", policy, tmp_path, polite, wanted_words, constraints=EQUAL, task_rewards=["polite"])


# ---- resume ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "multipliers"),
    [
        ("rloo", {"update_per": "mini_batch", "momentum": 0.5}),
        ("ppo", {"pid": {"kp": 2.0, "ki": 0.2, "kd": 0.1}}),
        ("reinforce_pp", {"form": "squared"}),
    ],
)
def test_multipliers_resume_exactly_within_a_rollout(method, multipliers, policy, tmp_path):
    """Four updates per rollout; the checkpoint of step 6 is in the middle of the second, step 9 begins the third."""
    held = EQUAL if multipliers.get("form") == "squared" else BOTH

    def run(resume):
        trainer = make(
            method, policy, tmp_path, polite, wanted_words, constraints=held, multipliers=multipliers, max_steps=9,
            num_mini_batches=2, num_iterations=2, per_device_train_batch_size=4, save_strategy="steps", save_steps=6,
            max_completion_length=3,
        )  # fmt: skip
        trainer.train(tmp_path / "checkpoint-6" if resume else None)
        keys = ("loss", *(key for key in trainer.state.log_history[-2] if key.startswith("constraints/")))
        return parameters(trainer.model), {key: logged(trainer, key)[-1] for key in keys}

    whole, resumed = run(False), run(True)
    assert_same(whole[0], resumed[0])
    assert whole[1] == resumed[1] and len(whole[1]) > 4
