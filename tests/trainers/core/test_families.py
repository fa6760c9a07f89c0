"""Architectures of which transformers, TRL or PEFT expect something that their classes do not have."""

import json
import logging

import pytest
import torch
import transformers as tf
from safetensors import safe_open

from align.data import toy
from align.errors import ConfigError, TrainingError
from align.modeling.load import load_policy
from align.modeling.pretrained import causal_class
from align.modeling.text_part import freeze_unreached, unreached
from tests.trainers.core.test_saved import assert_saved, lora, trained
from tests.trainers.tiny_runs import logged

SIZES = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.1,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
VISION = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_global_layers": 1,
    "image_size": 28, "patch_size": 14, "vision_output_dim": 64, "intermediate_layers_indices": [0],
    "attention_heads": 2, "num_attention_heads": 2,
}  # fmt: skip
FAMILIES = {
    "GraniteMoe": {**EXPERTS},
    "Phimoe": {**EXPERTS},
    "DeepseekV4": {
        "head_dim": 16, "num_key_value_heads": 1, "q_lora_rank": 16, "o_lora_rank": 8, "o_groups": 2,
        "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "index_n_heads": 2,
        "index_head_dim": 16, "index_topk": 64, "layer_types": ["sliding_attention", "compressed_sparse_attention"],
        "mlp_layer_types": ["moe", "moe"],
    },
    "Llama4Text": {**EXPERTS, "num_experts_per_tok": 1, "intermediate_size_mlp": 32, "head_dim": 16},
    "Mamba": {"state_size": 4, "time_step_rank": 4},
    "FalconH1": {
        "head_dim": 16, "mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_head": 16, "mamba_d_state": 4,
        "mamba_n_groups": 1, "mamba_chunk_size": 8,
    },
    "Laguna": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 16},
    "Jamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4, "num_experts": 2,
        "use_mamba_kernels": False,
    },
}  # fmt: skip


@pytest.fixture
def family(tmp_path):
    """Makes a folder of a tiny model of the family."""

    def make(name: str) -> str:
        tokenizer = toy.tokenizer()
        ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": 1}
        text = {**SIZES, "vocab_size": len(tokenizer), **ends}
        if name == "Mllama":
            text |= {"num_hidden_layers": 3, "cross_attention_layers": [1]}
            config = tf.MllamaConfig(text_config=text, vision_config=VISION, image_token_index=79)
        else:
            config = getattr(tf, f"{name}Config")(**{**text, **FAMILIES[name]})
        with torch.random.fork_rng():
            torch.manual_seed(0)
            causal_class(config).from_config(config).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return make


@pytest.mark.parametrize("name", ["GraniteMoe", "Phimoe", "DeepseekV4", "Llama4Text"])
def test_sft_of_mixtures(name, family, tmp_path):
    """TRL reads their number of experts by one name; it asks for router logits that they do not hand out, or the base
    of the model for its hidden states by a name that is not there. None of it is left in what is saved."""
    model, out = family(name), tmp_path / "out"
    trainer = trained("sft", model, out)
    assert len(logged(trainer, "loss")) == 2
    assert bool(logged(trainer, "aux_loss")) is (name in ("Phimoe", "DeepseekV4"))
    before, after = (json.loads((tmp_path / folder / "config.json").read_text()) for folder in (model, "out"))
    assert before["router_aux_loss_coef"] == after["router_aux_loss_coef"] > 0
    assert before.keys() >= after.keys() - {"use_cache"}


def test_a_mixture_without_router_logits_trains_without_its_loss(family, tmp_path, caplog):
    model = family("GraniteMoe")
    trained("dpo", model, tmp_path / "out")
    assert "is trained without a load-balancing loss" in caplog.text
    for method in ("dpo", "sft"):
        with pytest.raises(ConfigError, match="no load-balancing loss for GraniteMoe"):
            trained(method, model, tmp_path / "asked", router_aux_loss_coef=0.1)


@pytest.mark.parametrize(
    ("name", "left_out"),
    [
        ("DeepseekV4", {"o_a_proj", "weights_proj"}),  # the second is of an indexer
        ("Llama4Text", {"router"}),
        ("Mamba", {"dt_proj", "out_proj", "x_proj"}),
        ("FalconH1", {"out_proj"}),
        ("Jamba", {"dt_proj", "router"}),
    ],
)
def test_all_linear_is_what_an_adapter_can_change(name, left_out, family, tmp_path, caplog):
    """The others ended the run, were refused by PEFT, or were never trained; what an adapter on
    Jamba's router computes would count as router logits."""
    caplog.set_level(logging.INFO, "align")
    model = family(name)
    trainer = trained("dpo", model, tmp_path / "out", lora())
    linear = {n.rpartition(".")[2] for n, m in load_policy(model).named_modules() if isinstance(m, torch.nn.Linear)}
    adapted = {n.split(".lora_A")[0].rpartition(".")[2] for n, _ in trainer.model.named_modules() if "lora_A" in n}
    assert linear - adapted == {*left_out, "lm_head"} and "get no adapter" in caplog.text
    assert name == "DeepseekV4" or "got no gradient" not in caplog.text
    assert_saved("dpo", trainer, tmp_path / "out")


def test_an_adapter_that_peft_would_not_find_again_is_refused(family, tmp_path):
    """transformers' renaming of Laguna's old checkpoints hits `shared_experts` too, whose adapters PEFT dropped."""
    model = family("Laguna")
    with pytest.raises(TrainingError, match="shared_experts.gate_proj under another name, and drops it"):
        trained("dpo", model, tmp_path / "out", lora())
    attention = lora(target_modules=["q_proj", "v_proj"])
    assert_saved("dpo", trained("dpo", model, tmp_path / "attention", attention), tmp_path / "attention")


def test_what_is_saved_of_llama_3_2_vision_can_be_loaded(family, tmp_path):
    """`AutoModelForCausalLM` makes a text model of it that it does not load once it is saved."""
    model, out = family("Mllama"), tmp_path / "out"
    trainer = trained("dpo", model, out)
    assert type(trainer.model).__name__ == type(load_policy(out)).__name__ == "MllamaForConditionalGeneration"
    ids = torch.tensor([[5, 9, 14, 7, 3]])
    with torch.no_grad():
        assert torch.equal(load_policy(out).eval()(ids).logits, trainer.model.eval()(ids).logits)
    assert not torch.equal(load_policy(model).eval()(ids).logits, trainer.model(ids).logits)
    with safe_open(out / "model.safetensors", "pt") as file:
        assert any("vision" in name for name in file.keys())  # noqa: SIM118


def test_towers_beside_the_base_are_frozen_and_the_head_is_not():
    """Of Qwen-Omni, whose base transformers does not find under its name."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    audio = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "output_dim": 32}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    text = {**SIZES, "vocab_size": 40, "rope_parameters": rope}
    config = tf.Qwen2_5OmniThinkerConfig(audio_config=audio, vision_config=vision, text_config=text)
    model = tf.Qwen2_5OmniThinkerForConditionalGeneration(config)
    freeze_unreached(model)
    assert list(unreached(model)) == ["audio_tower", "visual"] and model.base_model is model.model
    assert all(p.requires_grad for module in (model.model, model.lm_head) for p in module.parameters())
