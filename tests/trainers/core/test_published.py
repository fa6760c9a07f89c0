"""What published folders have beside a model's weights, and forms that they come in."""

import shutil
from pathlib import Path

import pytest
import transformers as tf
from peft import LoraConfig

from align.modeling.adapters import finish_adapter
from align.modeling.export import export_model
from align.modeling.load import load_policy, load_sequence_classifier
from align.modeling.padding import with_own_padding
from align.modeling.processor_files import FILES
from align.trainers.core.experts import router_coefficient
from align.trainers.core.saving import finish_folder
from align.trainers.reward import RewardTrainer
from align.trainers.sft import SFTTrainer
from tests.reward_models import worlds
from tests.trainers import reward_runs
from tests.trainers.core.text_and_images import gemma3
from tests.trainers.pairs.preference_runs import toy_pairs
from tests.trainers.tiny_runs import demonstrations, sft_config


@pytest.fixture(scope="module")
def gemma(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gemma3")
    gemma3(folder)
    for name in FILES:
        (folder / name).write_text(name)
    return folder


def test_an_adapter_is_exported_with_the_files_of_images(gemma, tmp_path):
    """The layers that were rounded, to see what a cast may change, were the vision tower's: every cast was too much."""
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = load_policy(gemma, peft_config=config)
    adapted.save_pretrained(tmp_path / "run")
    finish_adapter(tmp_path / "run", adapted)
    tf.AutoTokenizer.from_pretrained(gemma).save_pretrained(tmp_path / "run")
    found = export_model(tmp_path / "run", tmp_path / "out", dtype="bfloat16")
    assert 1e-4 < found.gap < found.bound
    assert [(tmp_path / "out" / name).read_text() for name in FILES] == list(FILES)
    assert not any((tmp_path / "run" / name).exists() for name in FILES)


def test_a_whole_model_is_saved_with_the_files_of_images(gemma, tmp_path, caplog):
    loaded = load_policy(gemma)
    loaded.save_pretrained(tmp_path)
    loaded.config.name_or_path = str(tmp_path / "gone")
    finish_folder(tmp_path, loaded)
    assert not any((tmp_path / name).exists() for name in FILES) and "are not copied from" in caplog.text
    loaded.config.name_or_path = str(gemma)
    finish_folder(tmp_path, loaded)
    assert [(tmp_path / name).read_text() for name in FILES] == list(FILES)


@pytest.mark.parametrize(("method", "given"), [("sft", True), ("reward", False)])
def test_a_padding_token_that_the_model_has_no_embedding_for(method, given, policy, tmp_path, caplog):
    """Added to the tokenizer alone: SFT ended in torch's index error, others saved a model that nothing loads."""
    tokenizer = tf.AutoTokenizer.from_pretrained(policy)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    start = tmp_path / "start"
    shutil.copytree(policy, start)
    if not given:
        tokenizer.save_pretrained(start)
    if method == "sft":
        rows, trainer, args = demonstrations(8), SFTTrainer, sft_config(tmp_path / "run", max_steps=1)
    else:
        rows, trainer, args = toy_pairs(8), RewardTrainer, reward_runs.config(tmp_path / "run", max_steps=1)
    made = trainer(str(start), args, rows, processing_class=tokenizer if given else None)
    made.train()
    made.save_model()
    assert "none for its tokenizer's padding token [PAD]" in caplog.text
    (load_policy if method == "sft" else load_sequence_classifier)(tmp_path / "run")


def test_a_reward_model_pads_with_a_token_that_has_an_embedding():
    tokenizer = worlds.tokenizer()
    tokenizer.pad_token, padding = tokenizer.eos_token, tokenizer.convert_tokens_to_ids("<pad>")
    assert (
        with_own_padding(tokenizer, padding + 1).pad_token == "<pad>" != with_own_padding(tokenizer, padding).pad_token
    )


def test_a_dense_model_of_a_family_of_mixtures_is_none(caplog):
    """Granite 4's: the run warned of a mixture without a load-balancing loss."""
    sizes = {"num_hidden_layers": 1, "layer_types": ["attention"], "shared_intermediate_size": 16, "vocab_size": 20}
    sizes |= {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    sizes |= {"mamba_n_heads": 2, "mamba_d_head": 16, "mamba_n_groups": 1}
    for experts, warned in ((0, False), (2, True)):
        config = tf.GraniteMoeHybridConfig(**sizes, num_local_experts=experts, num_experts_per_tok=experts)
        caplog.clear()
        assert router_coefficient(tf.GraniteMoeHybridForCausalLM(config), None) == 0
        assert ("is a mixture of experts" in caplog.text) is warned
