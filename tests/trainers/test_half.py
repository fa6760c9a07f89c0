"""Half fine-tuning: which weights are frozen, that they stay, and that a resumed run has its own half."""

import pytest
from peft import LoraConfig
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from align.data import toy
from align.errors import ConfigError
from align.modeling.half import freeze_half
from align.trainers.sft import SFTTrainer
from tests.trainers.tiny_runs import assert_same, demonstrations, logged, parameters, sft_config, tiny_model


def test_half_of_every_part_of_every_layer():
    model = tiny_model(toy.tokenizer(), num_hidden_layers=4)
    frozen = freeze_half(model, "0 0")
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == set(frozen)
    mlp = []
    for layer in range(4):
        own = [name.removeprefix(f"model.layers.{layer}.") for name in frozen if f".layers.{layer}." in name]
        assert sum(name.startswith("self_attn") for name in own) == 2 and sum("layernorm" in name for name in own) == 1
        mlp.append(sum(name.startswith("mlp") for name in own))
    assert sorted(mlp) == [1, 1, 2, 2] and sum(mlp) == 6 and len(frozen) == 4 * 3 + 6
    assert all(".layers." in name for name in frozen)
    others = [freeze_half(tiny_model(toy.tokenizer(), num_hidden_layers=4), seed) for seed in ("0 0", "0 1", "1 0")]
    assert others[0] == frozen and frozen not in others[1:] and others[1] != others[2]


def test_biases_go_with_their_weights_and_other_names_are_found():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=8, n_embd=8, n_layer=2, n_head=2))
    frozen = freeze_half(model, "0 0")
    assert {name.removesuffix(".bias") for name in frozen if name.endswith(".bias")} == {
        name.removesuffix(".weight") for name in frozen if name.endswith(".weight")
    }
    assert sum(".attn." in name for name in frozen) == 4 and sum(".ln_" in name for name in frozen) == 4
    with pytest.raises(ConfigError, match="Linear has no trained weights in numbered layers"):
        freeze_half(nn.Linear(2, 2), "0 0")


def test_the_frozen_half_stays_and_resumes(tmp_path):
    def run(resume, half=1):
        args = sft_config(
            tmp_path, max_steps=4, save_strategy="steps", save_steps=2, half_finetuning=half, weight_decay=0.1
        )
        model = tiny_model(toy.tokenizer())
        before = parameters(model)
        trainer = SFTTrainer(model, args, demonstrations(32), processing_class=toy.tokenizer())
        trainer.train(resume_from_checkpoint=resume)
        after = parameters(trainer.model)
        return after, {name for name in after if (after[name] == before[name]).all()}, logged(trainer, "loss")

    whole, resumed = run(None), run(str(tmp_path / "checkpoint-2"))
    assert_same(whole[0], resumed[0])
    assert whole[1:] == resumed[1:] and whole[1] == set(freeze_half(tiny_model(toy.tokenizer()), "42 1"))
    assert whole[2][-1] < whole[2][0]
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    args = sft_config(tmp_path, half_finetuning=0)
    with pytest.raises(ConfigError, match="half_finetuning freezes half"):
        SFTTrainer(
            tiny_model(toy.tokenizer()), args, demonstrations(8), processing_class=toy.tokenizer(), peft_config=lora
        )
    with pytest.raises(ConfigError, match="half_finetuning must be at least 0"):
        sft_config(tmp_path, half_finetuning=-1)
