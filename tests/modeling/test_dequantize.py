"""Checkpoints of FP8 and MXFP4 weights: read as the numbers that they stand for, and saved and sent as such."""

import json
from unittest.mock import Mock

import pytest
import torch
import transformers as tf
from peft import LoraConfig
from safetensors.torch import load_file

from align.data import toy
from align.errors import ConfigError
from align.modeling.dequantize import of_ordinary_weights
from align.modeling.export import export_model
from align.modeling.load import load_policy, load_sequence_classifier, train_in_float32
from align.modeling.pretrained import empty_model
from align.rollout.weights import checkpoint_weights
from align.trainers.dpo import DPOTrainer
from tests.modeling.stored import made, stored
from tests.trainers.pairs.preference_runs import dpo_config, toy_pairs

KINDS = ["dense", "mixture", "gpt_oss"]


def check_ordinary(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.float(), expected[name])


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_read_sent_and_saved_as_the_numbers_they_stand_for(kind, tmp_path):
    expected = stored(tmp_path, kind)
    model = load_policy(str(tmp_path), dtype="float32")
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    check_ordinary(dict(checkpoint_weights(model, torch.float32)), expected)
    model.save_pretrained(tmp_path / "saved")
    check_ordinary(load_file(tmp_path / "saved" / "model.safetensors"), expected)
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    again = load_policy(str(tmp_path / "saved"), dtype="float32")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_reward_model_starts_from_the_numbers_they_stand_for(tmp_path):
    expected = stored(tmp_path, "dense")
    load_sequence_classifier(str(tmp_path)).save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.pop("score.weight").shape == (1, 32)
    check_ordinary(saved, {name: tensor for name, tensor in expected.items() if name != "lm_head.weight"})


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_the_user_has_loaded(kind, tmp_path):
    """transformers reads such weights as ordinary ones by itself where no GPU is."""
    expected = stored(tmp_path, kind)
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    train_in_float32(model, adapter=False)
    model.save_pretrained(tmp_path / "saved")
    check_ordinary(load_file(tmp_path / "saved" / "model.safetensors"), expected)


def test_the_config_for_an_engine_that_is_made_without_weights(tmp_path):
    """As `align serve` makes one: vLLM would expect the published form, and is sent ordinary numbers."""
    stored(tmp_path, "dense")
    config = empty_model(str(tmp_path)).config
    assert config.quantization_config and not hasattr(of_ordinary_weights(config), "quantization_config")
    assert of_ordinary_weights(config).hidden_size == config.hidden_size


@pytest.mark.parametrize("kind", ["dense", "gpt_oss"])
def test_training_in_full_and_with_an_adapter(kind, tmp_path):
    stored(tmp_path / "start", kind)
    whole = DPOTrainer(str(tmp_path / "start"), dpo_config(tmp_path / "whole", max_steps=1), toy_pairs(8))
    whole.train()
    whole.save_model()
    saved = load_policy(str(tmp_path / "whole"), dtype="float32")
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), saved.parameters(), strict=True))
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    args = dpo_config(tmp_path / "lora", learning_rate=0.1)
    adapted = DPOTrainer(str(tmp_path / "start"), args, toy_pairs(8), peft_config=lora)
    adapted.train()
    adapted.save_model()
    export_model(str(tmp_path / "lora"), str(tmp_path / "merged"), dtype="float32")
    merged = load_policy(str(tmp_path / "merged"), dtype="float32")
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted.model.eval()(ids).logits, atol=1e-5, rtol=1e-4)


def test_weights_that_cannot_be_trained_are_refused(tmp_path):
    """Of compressed-tensors norms and embeddings alone would be: the others have no gradient."""
    tokenizer = toy.tokenizer()
    model = made("dense", len(tokenizer), tokenizer.eos_token_id)
    model.config.quantization_config = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    with pytest.raises(ConfigError, match=r"quantised \(compressed-tensors\), which cannot be trained"):
        DPOTrainer(model, dpo_config(tmp_path), toy_pairs(8), processing_class=tokenizer)
    model.hf_quantizer, model.is_quantized = Mock(is_trainable=True, is_qat_trainable=False), True  # as of bitsandbytes
    with pytest.raises(ConfigError, match="the weights are quantised, which cannot be trained"):
        DPOTrainer(model, dpo_config(tmp_path), toy_pairs(8), processing_class=tokenizer)
