"""Several evaluation sets by name, the same way in every trainer; and what is refused as data, the same way too."""

import pytest
import torch
from datasets import Dataset, DatasetDict

from align.data import toy
from align.errors import ConfigError, DataError
from tests.trainers import reward_runs
from tests.trainers.pairs.preference_runs import dpo_config, toy_pairs
from tests.trainers.tiny_runs import (
    demonstrations,
    logged,
    on_policy_config,
    prompts,
    sft_config,
    tiny_model,
    wanted_words,
)

METRIC = {"sft": "mean_token_accuracy", "dpo": "rewards/margins", "reward": "rewards/margins", "remax": "proxy"}


def make_trainer(method, folder, train, evaluate=None, tokenizer=None, model=None, **options):
    """One of the four doors that data comes in by."""
    tokenizer = tokenizer or toy.tokenizer()
    model = model or tiny_model(tokenizer)
    if method == "sft":
        from align.trainers.sft import SFTTrainer

        return SFTTrainer(model, sft_config(folder, **options), train, evaluate, tokenizer)
    if method == "dpo":
        from align.trainers.dpo import DPOTrainer

        return DPOTrainer(model, dpo_config(folder, **options), train, evaluate, tokenizer)
    if method == "reward":
        from transformers import LlamaForSequenceClassification

        from align.trainers.reward import RewardTrainer

        model.config.num_labels = 1
        classifier = LlamaForSequenceClassification(model.config)
        options = {"max_length": 32, "max_steps": 2, **options}
        return RewardTrainer(classifier, reward_runs.config(folder, **options), train, evaluate, tokenizer)
    from align.trainers.remax import ReMaxConfig, ReMaxTrainer

    return ReMaxTrainer(
        model, wanted_words, on_policy_config(ReMaxConfig, folder, **options), train, evaluate, tokenizer
    )


def rows_of(method, count, seed=0) -> Dataset:
    return {"sft": demonstrations, "remax": prompts}.get(method, toy_pairs)(count, seed)


@pytest.mark.parametrize("method", METRIC)
def test_the_metrics_of_each_set_are_those_of_the_set_alone(method, tmp_path):
    near, far = rows_of(method, 6, 1), rows_of(method, 5, 2)
    kept = {"save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True}
    options = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "eval_on_start": False,
        **kept,
        "metric_for_best_model": f"far_{METRIC[method]}",
    }
    both = DatasetDict(near=near, far=far) if method in ("dpo", "remax") else {"near": near, "far": far}
    trainer = make_trainer(method, tmp_path / "run", rows_of(method, 16), both, **options)
    trainer.train()
    assert trainer.state.best_metric is not None
    for name in ("near", "far"):
        assert len(logged(trainer, f"eval_{name}_{METRIC[method]}")) == 2
    for name, rows in (("near", near), ("far", far)):
        own = trainer.evaluate()[f"eval_{name}_{METRIC[method]}"]
        alone = trainer.evaluate(rows)[f"eval_{METRIC[method]}"]
        given = trainer.evaluate({"x": rows})[f"eval_x_{METRIC[method]}"]
        torch.testing.assert_close(torch.tensor([own, given]), torch.tensor([alone, alone]))
    if method == "reward":
        assert trainer.normalizer.fitted_on == "both answers of 11 evaluation pairs"
    if method == "remax":
        trainer.close()


@pytest.mark.parametrize(
    ("method", "several", "metric", "message"),
    [
        ("dpo", True, None, "metric_for_best_model is 'loss', .* name one, such as eval_near_loss"),
        ("dpo", True, "eval_rewards/margins", "such as eval_near_rewards/margins"),
        ("remax", True, None, "metric_for_best_model is 'loss', .* name one, such as eval_near_loss"),
    ],
)
@pytest.mark.parametrize("needs", [{"load_best_model_at_end": True}, {"lr_scheduler_type": "reduce_lr_on_plateau"}])
def test_a_best_metric_that_no_evaluation_has_is_refused_at_the_start(
    method, several, metric, message, needs, tmp_path
):
    rows = rows_of(method, 4)
    options = {"eval_strategy": "steps", "save_strategy": "steps", **needs}
    with pytest.raises(ConfigError, match=message):
        make_trainer(
            method, tmp_path, rows, {"near": rows} if several else rows, **options, metric_for_best_model=metric
        )


def test_cached_references_of_several_sets(tmp_path):
    sets = {"near": toy_pairs(6, 1), "far": toy_pairs(5, 2)}
    live = make_trainer("dpo", tmp_path / "live", toy_pairs(16), sets)
    cached = make_trainer("dpo", tmp_path / "cached", toy_pairs(16), sets, precompute_ref_log_probs=True)
    live.train(), cached.train()
    for name in ("eval_near_rewards/margins", "eval_far_rewards/margins"):
        assert live.evaluate()[name] == pytest.approx(cached.evaluate()[name], abs=1e-6)


@pytest.mark.parametrize(
    "sets, sentence",
    [
        ({}, "an empty dict"),
        ({3: "rows"}, "3 is none"),
        ({"near": None}, "evaluation set 'near': .*got NoneType"),
        ({"near": [{"prompt": "a"}]}, "evaluation set 'near': .*from_list"),
    ],
)
def test_evaluation_sets_that_are_none(sets, sentence, tmp_path):
    with pytest.raises(DataError, match=sentence):
        make_trainer("dpo", tmp_path, toy_pairs(8), sets)


@pytest.mark.parametrize("method", METRIC)
def test_rows_that_fill_no_batch_are_left_out_of_training_alone(method, tmp_path):
    """transformers leaves them out of evaluations too: a reward model's normaliser, fitted on them, was a KeyError."""
    options = {"dataloader_drop_last": True, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}
    rows, count = rows_of(method, 6, 1), 3
    trainer = make_trainer(method, tmp_path / "run", rows, rows.select(range(count)), **options)
    seen = {"reward": "rewards/margins", "dpo": "rewards/margins"}.get(method)
    trainer.train()
    metrics = trainer.evaluate()
    assert f"eval_{METRIC[method]}" in metrics
    if seen is not None:
        assert len(trainer.evaluator.values[seen]) == count
    assert trainer.args.dataloader_drop_last
    with pytest.raises(ConfigError, match="leaves out all 3 training rows, which are fewer than the 4 of a batch"):
        make_trainer(method, tmp_path / "none", rows.select(range(count)), **options, max_steps=-1)
