"""A `metric_for_best_model` that no evaluation has: said before training where it is known, else with what there is."""

import pytest
from transformers import TrainerCallback

from align.data import toy
from align.errors import ConfigError
from align.trainers.dpo import DPOTrainer
from align.trainers.kto import KTOConfig, KTOTrainer
from tests.trainers.core.test_eval_sets import make_trainer, rows_of
from tests.trainers.pairs.preference_runs import dpo_config, toy_pairs
from tests.trainers.tiny_runs import QUIET, logged, tiny_model

EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": False, "max_steps": 4}
KEPT = {"save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True}


def checkpoints(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*"))


class Counts(TrainerCallback):
    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        metrics["eval_mine"] = float(state.global_step)


@pytest.mark.parametrize(
    ("method", "metric", "nearest"),
    [
        ("sft", "mean_token_acuracy", "eval_mean_token_accuracy"),
        ("dpo", "rewards/margin", "eval_rewards/margins"),
        ("reward", "eval_calibration", "eval_calibration_error"),
        ("remax", "eval_proxi", "eval_proxy"),
        ("dpo", "far_rewards/margin", "eval_far_rewards/margins"),
    ],
)
def test_a_misspelt_metric_is_named_before_the_first_step(method, metric, nearest, tmp_path):
    rows = rows_of(method, 6)
    sets = {"near": rows, "far": rows} if metric.startswith("far") else rows
    trainer = make_trainer(
        method, tmp_path, rows_of(method, 16), sets, **EVALUATED, **KEPT, metric_for_best_model=metric
    )
    with pytest.raises(ConfigError, match=f"evaluations have no .*; nearest: {nearest}. They have: .*loss") as found:
        trainer.train()
    assert found.value.key == "metric_for_best_model" and trainer.state.global_step == 0 and not checkpoints(tmp_path)


@pytest.mark.parametrize(("metric", "known"), [("rewards/margins", True), ("kl", True), ("rewards/accuracies", False)])
def test_kto_has_metrics_of_its_own(metric, known, tmp_path):
    options = {**QUIET, **EVALUATED, **KEPT, "metric_for_best_model": metric}
    args = KTOConfig(**options, output_dir=str(tmp_path), max_length=32)
    tokenizer = toy.tokenizer()
    trainer = KTOTrainer(tiny_model(tokenizer), args, toy_pairs(16), toy_pairs(6, 1), tokenizer)
    if known:
        trainer.train()
        assert trainer.state.best_metric in logged(trainer, f"eval_{metric}")
    else:
        with pytest.raises(ConfigError, match="eval_rewards/accuracies.* They have: eval_kl, .*, eval_rewards/margins"):
            trainer.train()


@pytest.mark.parametrize("method", ["sft", "dpo", "remax"])
def test_the_metric_of_a_callback_is_found(method, tmp_path):
    rows = rows_of(method, 6)
    options = {**EVALUATED, **KEPT, "metric_for_best_model": "mine", "greater_is_better": True}
    trainer = make_trainer(method, tmp_path, rows_of(method, 16), rows, **options)
    trainer.add_callback(Counts)
    trainer.train()
    assert trainer.state.best_metric == 4.0


def test_compute_metrics_is_waited_for(tmp_path):
    options = {**EVALUATED, **KEPT, "metric_for_best_model": "mine", "greater_is_better": True}
    tokenizer = toy.tokenizer()
    trainer = DPOTrainer(
        tiny_model(tokenizer), dpo_config(tmp_path, **options), toy_pairs(16), toy_pairs(6, 1), tokenizer,
        compute_metrics=lambda found: {"mine": float(len(found.predictions))},
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_metric == 6.0


@pytest.mark.parametrize("needs", [KEPT, {"save_strategy": "best"}, {"lr_scheduler_type": "reduce_lr_on_plateau"}])
def test_what_was_trained_is_kept_where_only_the_evaluation_shows_it(needs, tmp_path):
    def train(metric, **resume):
        options = {**EVALUATED, **needs, "metric_for_best_model": metric, "greater_is_better": True}
        trainer = make_trainer("dpo", tmp_path, toy_pairs(16), toy_pairs(6, 1), **options)
        trainer.add_callback(Counts)
        trainer.train(**resume)
        return trainer

    saves = needs.get("save_strategy") is not None
    kept = "What was trained is in .*checkpoint-2, from which" if saves else "eval_steps_per_second$"
    with pytest.raises(ConfigError, match=f"no eval_mines; nearest: eval_mine. They have: .*eval_loss.*{kept}"):
        train("mines")
    assert checkpoints(tmp_path) == (["checkpoint-2"] if saves else [])
    if saves:
        trainer = train("mine", resume_from_checkpoint=True)
        assert trainer.resumed.step == 2 and trainer.state.global_step == 4 and trainer.state.best_metric == 4.0
