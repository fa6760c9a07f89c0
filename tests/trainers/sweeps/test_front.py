"""Sweeps: one policy per weight vector from one cache, resumable, with exact soups between them."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from align.errors import ConfigError, DataError
from align.evaluation.front import read_front
from align.modeling.load import load_policy
from align.reward_models.base import Reward, RewardOutput
from align.reward_models.build import build_reward
from align.trainers.modpo import MODPOTrainer, WeightOptions
from align.trainers.sweeps.front import POINT_FILE, margin_policy, sweep_weights, train_front
from tests.trainers.test_modpo import config, exact_pairs, letters
from tests.trainers.tiny_runs import assert_same
from tests.trainers.two_processes import run_on_two

SWEEP = {"weights": "sweep", "sweep_points": 3, "sweep_min_weight": 0.2, "objective": "strength"}
NAMES = ["w_1_0", "w_0.6_0.4", "w_0.2_0.8"]


class Letters(Reward):
    """`letters`, counting in a file how many completions were scored: the class lives in every process."""

    def __init__(self, count: Path):
        self.name, self.count = "letters", count

    def _score(self, batch):
        self.count.write_text(self.count.read_text() + f"{len(batch)} " if self.count.exists() else f"{len(batch)} ")
        return RewardOutput(torch.tensor(letters(batch.completions)))


def sweep_config(folder, **options):
    settings = {"max_steps": 3, "per_device_train_batch_size": 20, "learning_rate": 1e-2, **SWEEP}
    return config(folder, **{**settings, **options})


def sweep(policy, folder, resume=False, reward=letters, **options):
    lora = LoraConfig(r=4, target_modules="all-linear")
    return train_front(policy, reward, sweep_config(folder, **options), exact_pairs(), peft_config=lora, resume=resume)


def weights_of(folder) -> dict[str, torch.Tensor]:
    return load_policy(folder).state_dict()


def test_weights_of_a_sweep():
    two = sweep_weights(["a", "b"], WeightOptions(sweep_points=5, sweep_min_weight=0.2), 0.1)
    assert [list(w.values()) for w in two] == [[1, 0], [0.8, 0.2], [0.6, 0.4], [0.4, 0.6], [0.2, 0.8]]
    three = sweep_weights(["a", "b", "c"], WeightOptions(sweep_points=3), 0.1)
    assert len(three) == 6 and three[0] == {"a": 1, "b": 0, "c": 0} and {"a": 0.1, "b": 0.45, "c": 0.45} in three
    assert all(sum(w.values()) == pytest.approx(1) and w["a"] >= 0.1 for w in three)
    with pytest.raises(ConfigError, match="at least two objectives"):
        sweep_weights(["a"], WeightOptions(), 0.1)


@pytest.fixture(scope="module")
def whole(policy, tmp_path_factory):
    """A sweep of three points with a soup between neighbours, and how often its reward was asked."""
    folder = tmp_path_factory.mktemp("front")
    reward = Letters(folder / "count.txt")
    sweep(policy, folder / "run", reward=reward, interpolate=1, precompute_ref_log_probs=True)
    return folder / "run", reward


def test_one_policy_per_weight_vector(whole, policy, tmp_path):
    folder, reward = whole
    front = read_front(folder)
    assert (front.method, front.reference, front.objectives) == ("modpo", policy, ["strength", "letters"])
    trained = [point for point in front.points if point.kind == "trained"]
    assert [point.name for point in trained] == NAMES
    assert all(point.seconds > 0 for point in trained) and front.seconds["margin rewards"] > 0
    assert reward.count.read_text().split() == ["120"]  # both completions of 60 pairs, once for all points
    assert len(list((folder / "margins").iterdir())) == 1
    weights = {"strength": 0.6, "letters": 0.4}
    lora = LoraConfig(r=4, target_modules="all-linear")
    alone = MODPOTrainer(
        policy, letters, sweep_config(tmp_path, weights=weights, sweep_points=None, sweep_min_weight=None),
        exact_pairs(), peft_config=lora,
    )  # fmt: skip
    alone.train()
    alone.save_model(str(tmp_path))
    for name, values in weights_of(tmp_path).items():
        torch.testing.assert_close(weights_of(trained[1].folder)[name], values, rtol=0, atol=1e-6)


def test_soups_between_neighbours(whole, policy):
    folder, _ = whole
    points = read_front(folder).points
    assert [point.kind for point in points] == ["trained", "soup", "trained", "soup", "trained"]
    assert points[1].weights == pytest.approx({"strength": 0.8, "letters": 0.2})
    base, left, soup, right = (weights_of(f) for f in (policy, *(point.folder for point in points[:3])))
    for name, values in base.items():
        expected = (left[name] - values) / 2 + (right[name] - values) / 2
        torch.testing.assert_close(soup[name] - values, expected, rtol=0, atol=1e-6)


def test_a_stopped_sweep_goes_on_where_it_was(policy, tmp_path):
    """Stopped within the second point, after its first checkpoint: the first is kept, the second continued."""
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if "w_0.6_0.4" in args.output_dir and state.global_step == 3:
                raise KeyboardInterrupt

    saving = {"save_strategy": "steps", "save_steps": 2}
    lora = LoraConfig(r=4, target_modules="all-linear")
    reward = Letters(tmp_path / "count.txt")
    with pytest.raises(KeyboardInterrupt):
        args = sweep_config(tmp_path / "run", **saving)
        train_front(policy, reward, args, exact_pairs(), peft_config=lora, callbacks=[Stop()])
    first = tmp_path / "run" / NAMES[0]
    before = (first / "adapter_model.safetensors").stat().st_mtime_ns
    assert [point.name for point in read_front(tmp_path / "run").points] == NAMES[:1]
    sweep(policy, tmp_path / "run", resume=True, reward=reward, **saving)
    assert (first / "adapter_model.safetensors").stat().st_mtime_ns == before
    assert [point.name for point in read_front(tmp_path / "run").points] == NAMES
    assert reward.count.read_text().split() == ["120"]
    sweep(policy, tmp_path / "other", **saving)
    for name in NAMES:
        assert_same(weights_of(tmp_path / "run" / name), weights_of(tmp_path / "other" / name))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 2e-2}, "learning_rate 0.01 before and 0.02 now"),
        ({"seed": 3}, "seed 42 before and 3 now"),
        ({"weight_decay": 0.3}, "weight_decay 0.0 before and 0.3 now"),
        ({"optim": "sgd"}, "optim 'adamw_torch(_fused)?' before and 'sgd' now"),
        ({"max_steps": 4}, "max_steps 3 before and 4 now"),
    ],
)
def test_points_of_other_settings_are_not_taken(whole, policy, options, message):
    folder, reward = whole
    with pytest.raises(ConfigError, match=f"{message}.*delete it, or use another output_dir"):
        sweep(policy, folder, resume=True, reward=reward, precompute_ref_log_probs=True, **options)


@pytest.mark.parametrize(
    ("model_name", "options", "message"),
    [
        ("another", None, "model .* before and 'another' now"),
        (None, {"dtype": "bfloat16"}, "model_options.* before and .*bfloat16.* now"),
    ],
    ids=["another", "loaded otherwise"],
)
def test_points_of_another_policy_are_not_taken(whole, policy, tokenizer, model_name, options, message):
    folder, reward = whole
    args = sweep_config(folder, precompute_ref_log_probs=True)
    lora = LoraConfig(r=4, target_modules="all-linear")
    with pytest.raises(ConfigError, match=message):
        train_front(
            lambda: load_policy(policy), reward, args, exact_pairs(), processing_class=tokenizer, peft_config=lora,
            resume=True, model_name=model_name or policy, model_options=options,
        )  # fmt: skip


def test_points_stay_with_options_that_change_nothing(whole, policy):
    folder, reward = whole
    other = {"logging_steps": 7, "save_strategy": "steps", "per_device_train_batch_size": 10}
    sweep(policy, folder, resume=True, reward=reward, interpolate=1, gradient_accumulation_steps=2, **other)
    assert reward.count.read_text().split() == ["120"]


def test_points_of_another_reward_are_not_taken(whole, policy):
    folder, _ = whole
    with pytest.raises(ConfigError, match="margins .* before"):
        sweep(policy, folder, resume=True, reward=letters, precompute_ref_log_probs=True)


@pytest.fixture(scope="module")
def margin(policy, tmp_path_factory):
    """What DPO made of the policy: whole, and as an adapter."""
    from align.trainers.dpo import DPOConfig, DPOTrainer

    folders = {}
    for form, lora in {"whole": None, "adapter": LoraConfig(r=2, target_modules="all-linear")}.items():
        folders[form] = tmp_path_factory.mktemp(form)
        shared = {"max_steps": 1, "per_device_train_batch_size": 20, "learning_rate": 1e-2, "beta": 0.5}
        args = DPOConfig(
            str(folders[form]), use_cpu=True, report_to="none", save_strategy="no", max_length=32, **shared
        )
        trainer = DPOTrainer(policy, args, exact_pairs(), peft_config=lora)
        trainer.train()
        trainer.save_model()
    return folders


def test_the_margin_policy_is_the_last_point(policy, margin, tmp_path, monkeypatch):
    monkeypatch.chdir(margin["adapter"].parent)
    spec = {"type": "implicit", "path": margin["adapter"].name, "beta": 0.5, "name": "other"}
    front = read_front(sweep(policy, tmp_path / "a", reward=spec, sweep_min_weight=None, interpolate=1))
    assert [p.kind for p in front.points] == ["trained", "soup", "trained", "soup", "margin"]
    assert [p.weights["strength"] for p in front.points] == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    assert front.points[-1].folder == str(margin["adapter"]) and not (tmp_path / "a" / "w_0_1").exists()
    base, left, soup, right = (weights_of(f) for f in (policy, *(p.folder for p in front.points[2:])))
    for name, values in base.items():
        expected = (left[name] - values) / 2 + (right[name] - values) / 2
        torch.testing.assert_close(soup[name] - values, expected, rtol=0, atol=1e-6)
    again = sweep(policy, tmp_path / "b", reward=spec, sweep_min_weight=0.4)
    assert [p.kind for p in read_front(again).points] == ["trained"] * 3


@pytest.mark.parametrize("change", [{"beta": 0.1}, {"path": "whole"}, {"reference": "whole"}])
def test_a_margin_policy_that_is_no_optimum_of_the_sweep_is_no_point(policy, margin, tmp_path, change):
    """Of another beta, in another form than the sweep's adapters, or trained from another policy."""
    spec = {"type": "implicit", "path": str(margin["adapter"]), "beta": 0.5, "name": "other", "reference": policy}
    spec |= {key: str(margin[value]) if value in margin else value for key, value in change.items()}
    with pytest.raises(ConfigError, match="sweep_min_weight 0: no pair trains the policy of that weight"):
        sweep(policy, tmp_path, reward=spec, sweep_min_weight=0.0)
    lora = LoraConfig(r=4, target_modules="all-linear")
    args = sweep_config(tmp_path, sweep_min_weight=None)
    assert margin_policy([build_reward(spec)], policy, args, lora) is None


def test_the_reference_is_what_training_started_from_or_the_named_one(policy, margin, tmp_path):
    """An adapter is merged into its base before it is trained on; the base is no reference then."""
    adapter, whole = str(margin["adapter"]), str(margin["whole"])
    short = {"max_steps": 1, "sweep_points": 2}
    assert read_front(sweep(adapter, tmp_path / "a", **short)).reference == adapter
    spec = {"type": "implicit", "path": adapter, "beta": 0.5, "name": "other"}
    named = {"ref_model_name_or_path": whole, **short}
    assert read_front(sweep(policy, tmp_path / "b", reward=spec, **named)).reference == whole
    with pytest.raises(ConfigError, match=f"trained from {whole} with beta"):  # the optimum of another reference
        sweep(policy, tmp_path / "c", reward=spec, **{**named, "sweep_min_weight": 0.0})


def test_a_sweep_ends_in_all_processes_when_its_front_is_there(policy, tmp_path):
    kinds = ["trained", "soup", "trained"]
    assert run_on_two("tests.trainers.sweeps.front_ranks", tmp_path, policy) == [kinds, kinds]


def test_weights_are_on_the_disk_before_a_point_counts_as_complete(policy, tmp_path, unflushed):
    sweep(policy, tmp_path, sweep_points=2, max_steps=1)
    assert unflushed[POINT_FILE] == []


def test_what_is_refused(policy, tmp_path):
    with pytest.raises(ConfigError, match="interpolate is for two objectives"):
        from tests.trainers.test_modpo import vowels

        sweep(policy, tmp_path, reward=[letters, vowels], interpolate=1)
    with pytest.raises(ConfigError, match="pass processing_class"):
        train_front(lambda: load_policy(policy), letters, sweep_config(tmp_path), exact_pairs())
    with pytest.raises(ConfigError, match="`weights: sweep`, not"):
        train_front(policy, letters, config(tmp_path), exact_pairs())
    with pytest.raises(DataError, match="holds no front.json"):
        read_front(tmp_path)
    (tmp_path / "front.json").write_text(json.dumps({"points": []}))
    with pytest.raises(DataError, match="no list of a front's points"):
        read_front(tmp_path)
    assert not (tmp_path / POINT_FILE).exists()
