"""A model of text and images (Gemma 3) is trained on text as a model of text is."""

import json
import logging

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from align.modeling.load import load_policy, load_sequence_classifier
from align.modeling.text_part import adapter_of_text, text_model, unreached
from align.trainers.remax import ReMaxTrainer
from tests.rollout.rollout_models import needs_vllm
from tests.trainers.core.test_saved import assert_saved, logits, lora, make, trained
from tests.trainers.core.text_and_images import CASES, gemma3, of_one_class, train
from tests.trainers.tiny_runs import assert_same, on_policy, prompts, wanted_words
from tests.trainers.two_processes import run_on_two

OF_ONE_CLASS = ["mistral3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"]
PARTS = ["model.vision_tower", "model.multi_modal_projector"]
IDS = torch.tensor([[5, 9, 14, 7, 3, 11, 20, 2]])


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return gemma3(tmp_path_factory.mktemp("gemma3"))


# ---- the parts ------------------------------------------------------------------------------------------------------


def test_what_no_text_reaches_is_frozen(model, policy, caplog):
    caplog.set_level(logging.INFO, "align")
    for loaded in (load_policy(model), load_sequence_classifier(model)):
        assert list(unreached(loaded)) == PARTS
        frozen = {n for n, p in loaded.named_parameters() if not p.requires_grad}
        assert frozen == {n for n, _ in loaded.named_parameters() if n.startswith(tuple(PARTS))}
    assert "model.vision_tower, model.multi_modal_projector see no text" in caplog.text
    text = load_policy(policy)
    assert not unreached(text) and text_model(text) is text


def test_weights_of_bfloat16_are_trained_in_float32_beside_frozen_towers(model, tmp_path):
    """Refused before: of weights that the user had frozen."""
    trainer = trained("dpo", model, tmp_path, model_init_kwargs={"dtype": "bfloat16"})
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("own", [None, ["gate_proj"], r".*\.gate_proj"], ids=["none", "names", "pattern"])
def test_an_adapter_adapts_text_alone(model, own):
    loaded = load_policy(model, peft_config=lora(exclude_modules=own))
    adapted = {n for n, _ in loaded.named_modules() if n.endswith(".lora_A")}
    assert adapted and all(".language_model." in name for name in adapted)
    assert any("gate_proj" in name for name in adapted) is (own is None)


def test_a_model_of_text_keeps_its_adapter_as_it_is(policy):
    config = lora()
    assert adapter_of_text(load_policy(policy), config) is config


def test_the_text_model_is_the_same_on_text(model):
    loaded = load_policy(model).eval()
    text = text_model(loaded)
    assert type(text).__name__ == "Gemma3ForCausalLM" and text is text_model(loaded)
    assert torch.equal(text(IDS).logits, loaded(IDS).logits)


@pytest.mark.parametrize("kind", OF_ONE_CLASS)
def test_classes_that_transformers_has_for_images_alone(kind, tmp_path):
    """`AutoModelForCausalLM` does not know them. A left-padded row has the logits of the row. So has the model of text
    that vLLM runs, made anew from its configuration."""
    loaded = load_policy(of_one_class(kind, tmp_path)).eval()
    assert unreached(loaded)
    mask = torch.tensor([[0] * 3 + [1] * 8])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = loaded(torch.cat([torch.zeros(1, 3).long(), IDS], 1), attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(padded[:, 3:], loaded(IDS).logits, atol=1e-5, rtol=1e-5)
    text = text_model(loaded)
    anew = type(text)(text.config).eval()
    anew.load_state_dict(text.state_dict())
    torch.testing.assert_close(anew(IDS).logits, loaded(IDS).logits, atol=1e-6, rtol=1e-6)


# ---- runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("peft", [None, lora()], ids=["full", "lora"])
@pytest.mark.parametrize("method", ["sft", "dpo", "reward", "remax", "ppo"])
def test_the_folder_is_the_trained_model(method, peft, model, tmp_path, caplog):
    """Full training ended at its first save: the files' names are others than the model's."""
    before = load_file(f"{model}/model.safetensors")
    trainer = trained(method, model, tmp_path, peft)
    assert_saved(method, trainer, tmp_path)
    assert "got no gradient" not in caplog.text
    with safe_open(tmp_path / ("adapter_model" if peft else "model").__add__(".safetensors"), "pt") as file:
        images = {name for name in file.keys() if "vision_tower" in name}  # noqa: SIM118
        if peft:
            assert not images
        else:
            assert images and all(torch.equal(file.get_tensor(name), before[name]) for name in images)


@pytest.mark.parametrize("peft", [None, lora()], ids=["full", "lora"])
@pytest.mark.parametrize("family", OF_ONE_CLASS)
def test_the_folder_of_other_families(family, peft, tmp_path):
    base, run = of_one_class(family, tmp_path / "model"), tmp_path / "run"
    expected = logits(trained("dpo", base, run, peft).model)
    assert (logits(load_policy(base)) - expected).abs().max() > 1e-3
    plain = AutoModelForImageTextToText.from_pretrained(base if peft else run)
    for loaded in (PeftModel.from_pretrained(plain, run) if peft else plain, load_policy(run)):
        torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=1e-5)


def test_an_adapter_on_an_adapter(model, tmp_path):
    trained("sft", model, tmp_path / "sft", lora())
    assert_saved("dpo", trained("dpo", tmp_path / "sft", tmp_path / "dpo", lora(r=2)), tmp_path / "dpo")
    assert "vision" not in " ".join(json.loads((tmp_path / "dpo/adapter_config.json").read_text())["target_modules"])


@pytest.mark.parametrize("family", ["gemma3", *OF_ONE_CLASS])
def test_shared_prefixes_give_the_losses_of_padded_pairs(family, model, tmp_path):
    if family != "gemma3":
        model = of_one_class(family, tmp_path / "model")
    shared = make("dpo", model, tmp_path / "shared", logging_steps=1)
    padded = make("dpo", model, tmp_path / "padded", logging_steps=1, batching="padded")
    assert type(shared.collator) is not type(padded.collator)
    losses = []
    for trainer in (shared, padded):
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


@pytest.mark.parametrize("setup", ["ddp", "fsdp2"])
def test_two_processes_are_one(setup, model, tmp_path):
    """DDP stops at parameters that get no gradient."""
    one = train(model, tmp_path / "one")
    first, second = run_on_two("tests.trainers.core.text_and_images", tmp_path / "two", model, setup)
    for case in CASES:
        assert first[case]["losses"] == second[case]["losses"]
        assert first[case]["losses"] == pytest.approx(one[case]["losses"], rel=1e-4, abs=1e-6)
        assert_same(first[case]["weights"], second[case]["weights"])
        torch.testing.assert_close(first[case]["weights"], one[case]["weights"], rtol=1e-4, atol=1e-5)


@needs_vllm
@pytest.mark.parametrize(
    ("family", "peft"),
    [("gemma3", None), ("gemma3", lora()), ("qwen2_5_vl", lora()), ("qwen3_vl", None)],
    ids=["gemma3", "gemma3, lora", "qwen2_5_vl, lora", "qwen3_vl"],
)
def test_vllm_runs_the_text_model(family, peft, model, tmp_path):
    """It needs no vision tower, and no processor of images."""
    if family != "gemma3":
        model = of_one_class(family, tmp_path / "model")
    kind, args = on_policy("remax", tmp_path, rollout={"backend": "vllm"}, logging_steps=1, learning_rate=1e-2)
    trainer: ReMaxTrainer = kind(model, wanted_words, args, prompts(16), peft_config=peft)
    trainer.train()
    gaps = [entry["rollout/mean_abs_logp_diff"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(gaps) == 2 and max(gaps) < 1e-5
    trainer.close()
