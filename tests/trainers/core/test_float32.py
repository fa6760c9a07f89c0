"""Weights that are trained are held in float32, whatever they were loaded in: at a learning rate as 1e-6 a weight in
bfloat16 would not move."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

from align.data import toy
from align.errors import ConfigError
from align.trainers.dpo import DPOTrainer
from align.trainers.reward import RewardTrainer
from tests.trainers import reward_runs
from tests.trainers.core.test_saved import lora, make
from tests.trainers.pairs.preference_runs import dpo_config, toy_pairs


def test_weights_are_trained_in_float32(policy, tmp_path, caplog):
    """At 1e-6 a weight in bfloat16 would not move."""
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.bfloat16)
    before = {name: p.detach().float().clone() for name, p in model.named_parameters()}
    trainer = make("sft", model, tmp_path, learning_rate=1e-6)
    trainer.train()
    moved = [(p != before[name]).float().mean() for name, p in trainer.model.named_parameters() if "layers" in name]
    assert min(moved) > 0.3 and "held, in float32" in caplog.text


@pytest.mark.parametrize("method", ["dpo", "reward", "remax"])
def test_weights_of_a_name_are_trained_in_float32_whatever_they_are_loaded_in(method, policy, tmp_path, caplog):
    trainer = make(method, policy, tmp_path, model_init_kwargs={"dtype": "bfloat16"})
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32} and "held, in float32" in caplog.text


@pytest.mark.parametrize("bf16", [False, True])
def test_what_is_trained_in_full_under_an_adapter_is_held_in_float32(bf16, policy, tmp_path):
    """PEFT copies the head of a reward model, and `modules_to_save`, in the dtype of the base."""
    model = LlamaForSequenceClassification.from_pretrained(policy, num_labels=1, dtype=torch.bfloat16)
    args = reward_runs.config(tmp_path / "reward", bf16=bf16, max_steps=2, learning_rate=1e-6)
    tokenizer = toy.tokenizer()
    trainer = RewardTrainer(model, args, toy_pairs(16), processing_class=tokenizer, peft_config=lora())
    head = trainer.model.get_base_model().score.modules_to_save["default"].weight
    before = head.detach().clone()
    trainer.train()
    assert head.dtype == torch.float32 and (head != before).float().mean() > 0.3
    policy = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.bfloat16)
    options = {"processing_class": tokenizer, "peft_config": lora(modules_to_save=["lm_head"])}
    args = dpo_config(tmp_path / "dpo", bf16=bf16, max_steps=1)
    if bf16:
        trainer = DPOTrainer(policy, args, toy_pairs(16), **options)
        assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
        return
    with pytest.raises(
        ConfigError, match="lm_head.* would be trained in torch.bfloat16.*load the model in float32, or"
    ):
        DPOTrainer(policy, args, toy_pairs(16), **options)
