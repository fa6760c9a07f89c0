"""`disable_dropout: false` on a model with dropout: what trains against a reference, and what the error says that does
not."""

import pytest

from align.errors import TrainingError
from align.trainers.core.reference_checks import DROPOUT
from align.trainers.kto import KTOConfig, KTOTrainer
from align.trainers.listwise_dpo import ListwiseDPOConfig, ListwiseDPOTrainer
from align.trainers.sparsepo import SparsePOConfig, SparsePOTrainer
from align.trainers.srpo import SRPOConfig, SRPOTrainer
from tests.trainers.core.test_eval_sets import make_trainer, rows_of
from tests.trainers.pairs.preference_runs import toy_pairs
from tests.trainers.tiny_runs import QUIET, logged, tiny_model

WITH_DROPOUT = {"disable_dropout": False, "max_steps": 1}
OTHERS = {
    "kto": (KTOTrainer, KTOConfig, {"max_length": 32}),
    "listwise": (ListwiseDPOTrainer, ListwiseDPOConfig, {"max_length": 32}),
    "srpo": (SRPOTrainer, SRPOConfig, {"max_length": 64}),
    "sparsepo": (SparsePOTrainer, SparsePOConfig, {"max_length": 32}),
}


def made(method, folder, tokenizer, **options):
    model = tiny_model(tokenizer, attention_dropout=0.3)
    if method not in OTHERS:
        return make_trainer(method, folder, rows_of(method, 8), tokenizer=tokenizer, model=model, **options)
    trainer, config, lengths = OTHERS[method]
    args = config(**{**QUIET, **lengths, **options}, output_dir=str(folder))
    return trainer(model, args, toy_pairs(8), None, tokenizer)


@pytest.mark.parametrize("method", ["dpo", *OTHERS])
def test_pairs_train_with_dropout_against_a_reference_without(method, tmp_path, tokenizer):
    losses = {}
    for off in (True, False):
        trainer = made(method, tmp_path / str(off), tokenizer, **{**WITH_DROPOUT, "disable_dropout": off})
        trainer.train()
        losses[off] = logged(trainer, "loss")
    assert losses[True] != losses[False]


def test_another_reference_is_found_through_dropout(tmp_path, tokenizer):
    trainer = made("dpo", tmp_path, tokenizer, **WITH_DROPOUT)
    trainer.reference.model.lm_head.weight.data.mul_(2)
    with pytest.raises(TrainingError, match="the reference is not the model that training starts from"):
        trainer.train()


@pytest.mark.parametrize("drawing", [{}, {"repetition_penalty": 1.2, "rollout_correction": "token_truncate"}])
def test_on_policy_runs_name_dropout(drawing, tmp_path, tokenizer):
    trainer = made("remax", tmp_path, tokenizer, **WITH_DROPOUT, **drawing)
    with pytest.raises(TrainingError) as found:
        trainer.train()
    assert str(found.value).endswith(DROPOUT)
