"""A resumed run has the rewards and the reference of the run that it goes on with, in 16 bits and on servers too."""

import pytest
import torch

from align.errors import RewardError, TrainingError
from align.reward_models.composite import CompositeReward
from align.reward_models.vllm_server import VllmReward
from align.trainers.dpo import DPOTrainer
from align.trainers.remax import ReMaxTrainer
from tests.modeling import tiny
from tests.trainers.pairs.preference_runs import dpo_config, toy_pairs
from tests.trainers.tiny_runs import prompts, remax_config, tiny_model, wanted_words

SAVED = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}


def train(make, folder, **options):
    """One step; then a run of two that goes on from there."""
    trainer = make(folder, **SAVED | options)
    trainer.train(resume_from_checkpoint="auto")
    getattr(trainer, "close", lambda: None)()
    return trainer


def nearly(tokenizer, scale: float):
    """A reference whose log-probs differ from another's of these by less than 16 bits round."""
    model = tiny_model(tokenizer, seed=1).bfloat16()
    with torch.no_grad():
        model.lm_head.weight[3] += scale
    return model


@pytest.mark.parametrize("method", ["dpo", "remax"])
def test_another_reference_is_refused_however_near_it_is(method, policy, tokenizer, tmp_path):
    """Log-probs of a few tokens, within what 16 bits round, were all that it was known by."""

    def make(folder, reference, **options):
        if method == "dpo":
            return DPOTrainer(policy, dpo_config(folder, bf16=True, **options), toy_pairs(16), ref_model=reference)
        args = remax_config(folder, bf16=True, **options)
        return ReMaxTrainer(policy, wanted_words, args, prompts(16), processing_class=tokenizer, ref_model=reference)

    def run(scale, **options):
        return train(lambda folder, **all_of: make(folder, nearly(tokenizer, scale), **all_of), tmp_path, **options)

    run(0.0)
    with pytest.raises(TrainingError, match=r"is of another run \(reference: .*resume_changes: \[reference\]"):
        run(1e-2, max_steps=2)
    if method == "dpo":
        assert run(1.0, max_steps=2, resume_changes=["reference"]).state.global_step == 2


class Served(VllmReward):
    """Answers as a server would whose scores are `scale` times the share of even ids."""

    scale = 1.0
    elsewhere = (*VllmReward.elsewhere, "scale")

    def ask(self, content, where, url=None):
        if content is None:
            return {"data": [{"id": "reward", "max_model_len": 64}]}
        return {"data": [{"probs": [self.scale * sum(i % 2 == 0 for i in ids) / len(ids)]} for ids in content["input"]]}


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    place = tmp_path_factory.mktemp("reward")
    tiny.classifier(vocab_size=len(tokenizer)).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


@pytest.mark.parametrize("gold", [False, True])
def test_another_model_on_a_server_is_refused(gold, policy, folder, tmp_path):
    """It was known by its scores of fixed sequences within one run alone."""

    def run(scale, **options):
        served = Served("http://a.test", folder, name="served")
        served.scale = scale
        reward = CompositeReward([served])
        rewards = {"reward": wanted_words, "gold_reward": reward} if gold else {"reward": reward}

        def make(place, **all_of):
            args = remax_config(place, eval_on_start=gold, **all_of)
            return ReMaxTrainer(policy, args=args, train_dataset=prompts(16), eval_dataset=prompts(2), **rewards)

        return train(make, tmp_path, **options)

    run(1.0)
    with pytest.raises(RewardError, match=r"another model than the run that is resumed had: 8 .*resume_changes: \[rew"):
        run(2.0, max_steps=2)
    if not gold:
        assert run(2.0, max_steps=2, resume_changes=["rewards"]).state.global_step == 2
