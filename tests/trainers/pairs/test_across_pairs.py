"""Losses that compare the pairs of a batch are not evaluated on single pairs, where they are other losses."""

import pytest

from align.errors import ConfigError
from align.trainers.dpo import DPOTrainer
from tests.trainers.pairs.preference_runs import dpo_config, toy_pairs


@pytest.mark.parametrize("options", [{"eval_strategy": "epoch"}, {"eval_strategy": "no", "eval_on_start": True}])
@pytest.mark.parametrize("loss", ["aot", "aot_unpaired"])
def test_a_run_that_evaluates_single_pairs_is_refused(loss, options, tmp_path):
    options = {"loss_type": ["sigmoid", loss], "per_device_eval_batch_size": 1, **options}
    with pytest.raises(ConfigError, match=f"{loss} compares the pairs of a batch, and per_device_eval_batch_size is 1"):
        dpo_config(tmp_path, **options)
    dpo_config(tmp_path, **{**options, "loss_type": "beta_dpo"})  # which compares none in evaluations
    dpo_config(tmp_path, **{**options, "eval_strategy": "no", "eval_on_start": False})


def test_evaluate_of_single_pairs_is_refused(policy, tmp_path):
    args = dpo_config(tmp_path, loss_type="aot", per_device_eval_batch_size=1, eval_strategy="no")
    trainer = DPOTrainer(policy, args, toy_pairs(4), toy_pairs(2))
    with pytest.raises(ConfigError, match="per_device_eval_batch_size is 1: set it to 2 or more"):
        trainer.evaluate()
