"""DPO loss weighting against its minimiser; soups of policies as a front."""

import math

import pytest
from datasets import Dataset
from peft import LoraConfig

from align.errors import ConfigError
from align.evaluation.front import read_front
from align.modeling.load import load_policy
from align.trainers.sweeps import loss_weighting
from align.trainers.sweeps.loss_weighting import (
    LossWeightingConfig,
    LossWeightingTrainer,
    soup_front,
    train_loss_weighting_front,
)
from tests.trainers.test_modpo import PROMPTS, WORDS, distribution, exact_pairs
from tests.trainers.tiny_runs import QUIET, logged


def config(folder, **options) -> LossWeightingConfig:
    defaults = {
        **QUIET,
        "output_dir": str(folder),
        "per_device_train_batch_size": 16,
        "max_length": 32,
        "max_steps": 3,
        "learning_rate": 5e-3,
        "beta": 0.5,
        "objective": "a",
        "weights": {"a": 0.6, "b": 0.4},
    }
    return LossWeightingConfig(**{**defaults, **options})


def comparisons(first: int, second: int) -> Dataset:
    """Of first + second comparisons of the two first words, the first wins `first`."""
    a, b = WORDS[:2]
    rows = [{"prompt": PROMPTS[0], "chosen": a, "rejected": b}] * first
    return Dataset.from_list(rows + [{"prompt": PROMPTS[0], "chosen": b, "rejected": a}] * second)


def test_the_minimiser_is_the_mixture_of_the_probabilities(policy, tokenizer, tmp_path):
    """sigmoid(beta * Delta) = sum_k w_k P_k(a > b), whatever the sizes of the sets."""
    sets = {"a": comparisons(3, 1), "b": comparisons(2, 8)}
    args = config(tmp_path, max_steps=120, per_device_train_batch_size=14, lr_scheduler_type="cosine", logging_steps=80)
    trainer = LossWeightingTrainer(policy, args, sets)
    before = distribution(load_policy(policy), tokenizer, PROMPTS[0])
    trainer.train()
    ratios = distribution(trainer.model, tokenizer, PROMPTS[0]) - before
    wanted = 0.6 * 3 / 4 + 0.4 * 2 / 10
    assert 0.5 * (ratios[0] - ratios[1]).item() == pytest.approx(math.log(wanted / (1 - wanted)), abs=1e-3)


def test_a_front_and_its_soups(policy, tmp_path):
    pairs = exact_pairs()
    sets = {"a": pairs.select(range(30)), "b": pairs.select(range(30, 60))}
    args = config(tmp_path / "lw", weights="sweep", sweep_points=3, interpolate=1)
    lora = LoraConfig(r=4, target_modules="all-linear")
    front = read_front(train_loss_weighting_front(policy, args, sets, peft_config=lora))
    assert (front.method, front.objectives) == ("dpo_lw", ["a", "b"])
    assert [p.weights["a"] for p in front.points] == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    again = train_loss_weighting_front(policy, args, sets, peft_config=lora, resume=True)
    assert [p.seconds for p in read_front(again).points] == [p.seconds for p in front.points]

    ends = {"a": front.points[0].folder, "b": front.points[-1].folder}
    vectors = [{"a": w, "b": 1 - w} for w in (0.25, 0.75)]
    soups = read_front(soup_front(ends, vectors, tmp_path / "soups", policy))
    assert [p.kind for p in soups.points] == ["soup", "soup"]
    assert soups.seconds == {"a": front.points[0].seconds, "b": front.points[-1].seconds}
    with pytest.raises(ConfigError, match="weights are given for"):
        soup_front(ends, [{"a": 1.0}], tmp_path / "soups", policy)


def test_the_sets_are_tokenised_as_those_of_other_methods(monkeypatch, tmp_path):
    given = {}
    monkeypatch.setattr(loss_weighting, "numbered_pairs", lambda rows, tokenizer, **options: given.update(options))
    loss_weighting.tokenized_sets({"a": None}, None, config(tmp_path, dataset_num_proc=2, max_bad_share=0.1))
    assert given == {"max_length": 32, "max_bad_share": 0.1, "num_proc": 2}


def test_a_set_of_weight_zero_is_left_out(policy, tmp_path):
    sets = {"a": comparisons(3, 1), "b": comparisons(2, 8)}
    args = config(tmp_path, weights={"a": 1.0, "b": 0.0}, max_steps=1, per_device_train_batch_size=4)
    trainer = LossWeightingTrainer(policy, args, sets)
    assert len(trainer.train_dataset) == 4
    trainer.train()
    assert logged(trainer, "loss") == pytest.approx([math.log(2)], abs=1e-5)
    with pytest.raises(ConfigError, match="must not be negative"):
        LossWeightingTrainer(policy, config(tmp_path, weights={"a": 1.0, "b": -1.0}), sets)
    with pytest.raises(ConfigError, match="objectives are"):
        LossWeightingTrainer(policy, config(tmp_path, weights={"a": 1.0}), sets)
