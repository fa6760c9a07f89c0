"""Nelder-Mead over thresholds within one run, on a tiny world."""

import json

import pytest
import torch
import yaml
from transformers import TrainerControl, TrainerState

from align.config import configs_dir
from align.data import toy
from align.errors import ConfigError
from align.trainers.weighting.base import FixedWeights
from align.trainers.weighting.search import StartPolicy, ThresholdSearch
from align.trainers.weighting.sections import SearchSection
from tests.trainers.tiny_runs import assert_same, logged, on_policy, parameters, prompts

HELD = [{"reward": "polite", "direction": "equal"}]
SEARCH = {"start": {"polite": 0.15}, "reached": {"polite": 0.9}, "budget": 4, "steps": 6}


def polite(completions, **columns) -> list[float]:
    return [float(any(word in toy.POLITE for word in text.split())) for text in completions]


def moderate(completions, **columns) -> list[float]:
    """Gold: best for one courtesy, worse for none and for more."""
    return [1.0 - abs(sum(word in toy.POLITE for word in text.split()) - 1) for text in completions]


def make(policy, folder, gold=moderate, search=SEARCH, method="rloo", **options):
    settings = {
        "constraints": HELD, "multipliers": {"pid": {"kp": 4.0, "ki": 0.5}}, "threshold_search": search, "beta": 0.1,
        "per_device_train_batch_size": 16, "num_generations": 4, "max_completion_length": 4, "learning_rate": 5e-3,
        "max_steps": 60, "eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 64,
        "eval_num_generations": 4, **options,
    }  # fmt: skip
    kind, args = on_policy(method, folder, **settings)
    return kind(policy, polite, args, prompts(64), prompts(32, seed=1), gold_reward=gold)


def found(folder):
    return json.loads((folder / "threshold_search.json").read_text())


def test_a_search_keeps_its_budget_and_ends_the_run(policy, tmp_path):
    trainer = make(policy, tmp_path)
    trainer.train()
    stretches = found(tmp_path)["stretches"]
    assert len(stretches) == 4 and trainer.state.global_step == sum(s["steps"] for s in stretches) < 60
    for stretch in stretches:
        (threshold,), (value,) = stretch["thresholds"].values(), stretch["values"].values()
        assert stretch["met"] == (abs(value - threshold) <= 0.05 * threshold)
        assert stretch["met"] or stretch["steps"] == SEARCH["steps"]
    golds = logged(trainer, "eval_gold")
    ends = torch.tensor([s["steps"] for s in stretches]).cumsum(0).tolist()
    assert [s["gold"] for s in stretches] == [golds[end // 2] for end in ends]  # an evaluation every two steps
    best = max(stretches, key=lambda s: s["gold"])
    assert found(tmp_path)["best"] == {key: best[key] for key in ("thresholds", "gold", "met")}
    assert trainer.weighting.constraints[0].threshold == best["thresholds"]["polite"]
    used = logged(trainer, "constraints/polite_equal/threshold")
    assert (used[0], used[-1]) == (stretches[0]["thresholds"]["polite"], stretches[-1]["thresholds"]["polite"])


def test_every_stretch_can_start_from_the_first_policy(policy, tmp_path, caplog):
    gentle = {"pid": {"kp": 1.0, "ki": 0.1}}
    trainer = make(policy, tmp_path, search={**SEARCH, "restore": True, "budget": 3, "steps": 2}, multipliers=gentle)
    trainer.train()
    assert [s["steps"] for s in found(tmp_path)["stretches"]] == [2, 2, 2]
    assert not found(tmp_path)["best"]["met"] and "had not reached the best thresholds" in caplog.text
    distances = logged(trainer, "kl")  # of the policy that is trained, before its update
    assert distances[0] == distances[2] == distances[4] == 0 and min(distances[1], distances[3]) > 0
    raw = logged(trainer, "constraints/polite_equal/raw")
    values = logged(trainer, "constraints/polite_equal/value")
    for step, stretch in zip((0, 2, 4), found(tmp_path)["stretches"], strict=True):
        error = stretch["thresholds"]["polite"] - values[step]
        assert raw[step] == pytest.approx(1.1 * error, rel=1e-4)  # the first step of a fresh controller


class Thresholds(FixedWeights):
    """Remembers what is set, and how often it is restarted."""

    def __init__(self):
        super().__init__(["polite"], [1.0])
        self.set, self.restarts = [], 0

    def set_thresholds(self, thresholds):
        self.set.append(thresholds["polite"])

    def restart(self):
        self.restarts += 1


def test_a_search_needs_no_trainer(tmp_path):
    """Driven by the metrics of evaluations alone: here the policy reaches any threshold within two steps, and the gold
    score is best at 0.5."""
    model, weighting, pushes = torch.nn.Linear(1, 1, bias=False), Thresholds(), []
    optimizer, begin = torch.optim.Adam(model.parameters()), model.weight.item()
    options = SearchSection(**SEARCH, restore=True, cache=None)
    start = StartPolicy(model, lambda: pushes.append(model.weight.item()))
    search = ThresholdSearch(options, weighting, seed=0, folder=tmp_path, start=start)
    state, control = TrainerState(), TrainerControl()

    def evaluate(value):
        metrics = {"eval_gold": 1 - abs(value - 0.5), "eval_rewards/polite": value}
        search.on_evaluate(None, state, control, metrics, model=model, optimizer=optimizer)

    evaluate(0.3)
    assert not weighting.set  # not in training
    search.on_train_begin(None, state, control)
    evaluate(0.0)
    while not control.should_training_stop:
        threshold = weighting.set[-1]
        for value in (threshold / 2, threshold):
            model.weight.grad = torch.ones(1, 1)
            optimizer.step()
            state.global_step += 1
            evaluate(value)
    stretches, best = found(tmp_path)["stretches"], found(tmp_path)["best"]
    assert [s["thresholds"]["polite"] for s in stretches] == weighting.set[:-1] and len(stretches) == 4
    assert all(s["met"] and s["steps"] == 2 for s in stretches) and state.global_step == 8
    assert (
        best["gold"] == max(1 - abs(t - 0.5) for t in weighting.set)
        and weighting.set[-1] == best["thresholds"]["polite"]
    )
    assert weighting.restarts == 3 and pushes == [begin] * 3
    assert optimizer.state[model.weight]["step"] == 2  # Adam's, begun anew with the last stretch


FOLLOWED = {
    "method": "ppo", "search": {**SEARCH, "restore": True, "budget": 3, "steps": 4}, "kl_target": 1.0, "kl_gain": 0.5,
    "critic_learning_rate": 0.01, "critic_warmup_steps": 2, "use_adaptive_entropy": True, "entropy_target": 9.0,
    "lr_scheduler_type": "linear", "multipliers": None, "num_generations": 1, "num_iterations": 1,
    "num_mini_batches": 1, "eval_on_start": False,
}  # fmt: skip
"""What follows the policy: beta, the entropy's coefficient, the critic with its warm-up, and the schedule."""


def test_a_stretch_starts_with_what_follows_the_policy_as_it_was(policy, tmp_path):
    """Otherwise a stretch's score would be that of the stretches before it too."""
    trainer = make(policy, tmp_path, **FOLLOWED)
    trainer.train()
    assert [s["steps"] for s in found(tmp_path)["stretches"]] == [4, 4, 4]
    for key in ("beta", "entropy_coef", "learning_rate"):
        values = logged(trainer, key)[2:]  # after a first evaluation
        assert values[:4] == values[4:8] == values[8:] and len(set(values[:4])) == 4, key
    values, distances = logged(trainer, "critic/value")[2:], logged(trainer, "kl")[2:]
    assert values[0] == values[4] == values[8] == 0 and values[1] != values[5]
    assert all(distances[i] == 0 for i in range(12) if i % 4 < 3) and all(distances[i] > 0 for i in (3, 7, 11))


@pytest.mark.parametrize(
    ("options", "step"), [({}, 6), ({**FOLLOWED, "search": {**FOLLOWED["search"], "budget": 2}}, 8)]
)
def test_a_search_resumes_exactly(options, step, policy, tmp_path):
    def run(resume):
        trainer = make(policy, tmp_path, **options, save_strategy="steps", save_steps=step)
        trainer.train(tmp_path / f"checkpoint-{step}" if resume else None)
        return parameters(trainer.model), found(tmp_path), trainer.state.global_step

    whole, resumed = run(False), run(True)
    assert_same(whole[0], resumed[0])
    assert whole[1:] == resumed[1:] and len(whole[1]["stretches"]) == options.get("search", SEARCH)["budget"]


@pytest.mark.parametrize(("steps", "stretches"), [(3, 1), (1, 0)])
def test_a_search_that_the_run_cuts_off_says_so(steps, stretches, policy, tmp_path, caplog):
    trainer = make(policy, tmp_path, search={**SEARCH, "steps": 2}, max_steps=steps)
    trainer.train()
    assert f"ended at step {steps} after {stretches} stretches of the 4" in caplog.text
    assert ("had not reached the best thresholds" in caplog.text) == bool(stretches)


def test_the_preset_has_all_keys():
    preset = yaml.safe_load((configs_dir() / "nm_ppo.yaml").read_text(encoding="utf-8"))["threshold_search"]
    assert preset.keys() == SearchSection.model_fields.keys()
    defaults = {name: field.default for name, field in SearchSection.model_fields.items() if not field.is_required()}
    assert {name: preset[name] for name in defaults} == defaults


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"search": {"budget": 4}}, "threshold_search needs 'start' and 'reached' and 'steps'"),
        ({"search": {**SEARCH, "steps": 1}}, "steps is 1 and eval_steps 2"),
        ({"eval_steps": 0.1}, "eval_steps 0.1 is a share of the run"),
        ({"search": {**SEARCH, "budget": 1}}, "budget must be at least 2"),
        ({"search": {**SEARCH, "start": {"rude": 0}}}, "start and reached must name polite"),
        ({"search": {**SEARCH, "reached": {"polite": 0.15}}}, "two different values per dimension, look at polite"),
        ({"constraints": [{**HELD[0], "direction": "at_least"}], "multipliers": None}, "that are all `equal`"),
        ({"constraints": [{**HELD[0], "threshold": 0.2}]}, "finds the threshold of polite: leave out 0.2"),
        ({"search": None}, "polite has no threshold: write one, or have it found"),
        ({"eval_strategy": "no"}, "set eval_strategy: steps"),
        ({"gold": None}, "needs a gold_reward"),
        ({"search": {**SEARCH, "restore": True}, "num_iterations": 4}, "a multiple of the 4 steps of a rollout"),
        ({**FOLLOWED, "critic_warmup_steps": 4}, "the 4 steps of critic_warmup_steps, and has 4"),
        ({**FOLLOWED, "sync_ref_model": True}, "what sync_ref_model has learned"),
        ({**FOLLOWED, "lr_scheduler_type": "reduce_lr_on_plateau"}, "what lr_scheduler_type: reduce_lr_on_plateau has"),
    ],
)
def test_what_does_not_fit_is_refused(options, message, policy, tmp_path):
    with pytest.raises(ConfigError, match=message):
        make(policy, tmp_path, **options)
