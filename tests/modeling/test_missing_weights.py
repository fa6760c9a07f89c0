"""Checkpoints whose weights are not those of the model's class: what would be drawn at random or left out is said."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from align.errors import ConfigError
from align.modeling.load import load_policy, load_sequence_classifier
from tests.modeling import tiny


def changed(model, folder, change) -> str:
    """The folder of the model with other weights in it. change: of the weights by name."""
    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    return str(folder)


def renamed(old, new):
    return lambda weights: {name.replace(old, new): value for name, value in weights.items()}


def without(part):
    return lambda weights: {name: value for name, value in weights.items() if part not in name}


@pytest.mark.parametrize("tied", [True, False])
def test_a_policy_under_other_names_is_refused(tied, tmp_path):
    """Of torch.compile, DDP or DeepSpeed-Chat: all weights were random."""
    folder = changed(tiny.causal(tie_word_embeddings=tied), tmp_path, lambda w: {f"_orig_mod.{k}": w[k] for k in w})
    with pytest.raises(ConfigError, match=r"no weights for .* and \d+ more, .*it holds _orig_mod.*Give the weights"):
        load_policy(folder)


@pytest.mark.parametrize("load", [load_policy, load_sequence_classifier])
def test_a_layer_that_is_missing_is_refused(load, tmp_path):
    """transformers draws it and warns; the run trained it."""
    model = tiny.causal() if load is load_policy else tiny.classifier()
    with pytest.raises(ConfigError, match=r"holds no weights for model.layers.1.mlp.*: the checkpoint is not complete"):
        load(changed(model, tmp_path, without("layers.1.mlp")))


def test_a_bias_that_is_missing_is_none(tmp_path):
    model = tiny.causal(attention_bias=True)
    assert load_policy(changed(model, tmp_path, without("bias"))).model.layers[0].self_attn.q_proj.bias.abs().sum() == 0


def test_the_trunk_of_a_reward_model_under_other_names_is_refused(tmp_path):
    """DeepSpeed-Chat's: its scores were those of random weights."""
    with pytest.raises(ConfigError, match="model.embed_tokens.weight.*it holds rwtransformer"):
        load_sequence_classifier(changed(tiny.classifier(), tmp_path, renamed("model.", "rwtransformer.")))


def test_a_score_layer_of_another_name_is_said(tmp_path, caplog):
    """OpenRLHF's and others': a new head was drawn in silence, and as a reward it was no reward model."""
    folder = changed(tiny.classifier(), tmp_path, renamed("score.", "value_head."))
    with pytest.raises(ConfigError, match=r"for its score \(score\). It holds value_head.weight: .*rename it"):
        load_sequence_classifier(folder, fresh_head=False)
    with caplog.at_level(logging.WARNING, "align"):
        load_sequence_classifier(folder, head_seed=1)
    assert "holds value_head.weight, for which LlamaForSequenceClassification has no place: a new head" in caplog.text


@pytest.mark.parametrize("fresh_head", [True, False])
def test_more_of_a_head_than_its_class_has_is_refused(fresh_head, tmp_path):
    """A bias of token classifiers: every score was off by it."""
    folder = changed(tiny.classifier(), tmp_path, lambda weights: weights | {"score.bias": torch.ones(1)})
    with pytest.raises(ConfigError, match="the score of .* is computed with score.bias too"):
        load_sequence_classifier(folder, fresh_head=fresh_head)


def test_what_stands_beside_a_head_is_said(tmp_path, caplog):
    extra = {"gating.0.weight": torch.ones(2, 2), "lm_head.weight": torch.ones(2, 2)}
    folder = changed(tiny.classifier(), tmp_path, lambda weights: weights | extra)
    with caplog.at_level(logging.WARNING, "align"):
        load_sequence_classifier(folder, fresh_head=False)
    assert "holds gating.0.weight, for which" in caplog.text and "lm_head" not in caplog.text


def test_code_of_the_models_own_is_not_asked_for(tmp_path, monkeypatch):
    """transformers waited at the terminal, and the error's first line left out what to do."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    tiny.causal().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    with pytest.raises(ConfigError, match=r"needs code of its own .*trust_remote_code: true trains it"):
        load_policy(tmp_path)
