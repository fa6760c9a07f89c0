"""Adapters that are refused before they train: what is saved of them would not be what was trained."""

import shutil

import pytest
import torch
from peft import AdaLoraConfig, TrainableTokensConfig, get_peft_model
from peft.tuners.lora.config import KasaConfig, MontecloraConfig
from transformers import AutoModelForCausalLM

from align.data import toy
from align.errors import ConfigError
from align.modeling.load import load_policy
from tests.trainers.core.test_saved import lora, make, trained


@pytest.mark.parametrize("method", ["sft", "dpo"])
@pytest.mark.parametrize(
    "first, second",
    [
        ({"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}, {"target_modules": ["lm_head"]}),
        ({"modules_to_save": ["up_proj"], "target_modules": ["q_proj"]}, {"target_modules": ["v_proj", "up_proj"]}),
        ({}, {"modules_to_save": ["mlp"], "target_modules": ["q_proj"]}),
    ],
)
def test_a_module_trained_in_full_and_adapted_is_refused(method, first, second, policy, tmp_path):
    """PEFT loads no adapter of a module that is trained in full: all of the second's training was lost."""
    trained("sft", policy, tmp_path / "one", lora(**first), max_steps=1)
    with pytest.raises(ConfigError, match="in full by one of|lm_head is the model's head"):
        make(method, str(tmp_path / "one"), tmp_path / "two", lora(**second))


def test_a_bias_that_cannot_be_merged_is_refused(policy, tmp_path):
    with pytest.raises(ConfigError, match="lora_bias: .*q_proj has no bias"):
        make("dpo", policy, tmp_path, lora(target_modules=["q_proj"], lora_bias=True))


def test_a_bias_of_an_adapter_made_elsewhere_is_refused(policy, tmp_path):
    """PEFT's RuntimeError came from the merge."""
    config = lora(target_modules=["q_proj"], lora_bias=True, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(policy), config).save_pretrained(tmp_path / "one")
    with pytest.raises(ConfigError, match="lora_bias: .*q_proj has no bias .*train the adapter without it"):
        load_policy(tmp_path / "one")


@pytest.mark.parametrize("method", ["sft", "dpo", "remax"])
def test_an_adapter_on_layers_that_share_a_weight_is_refused(method, policy, tmp_path):
    """A merge adds the updates of both to it: what was loaded was 0.6 nats from what had been trained."""
    with pytest.raises(ConfigError, match="share one weight .layer_replication"):
        make(method, policy, tmp_path, lora(target_modules=["q_proj"], layer_replication=[[0, 2], [0, 2]]))


def test_an_adapter_of_replicated_layers_that_was_made_elsewhere_is_refused(policy, tmp_path):
    config = lora(target_modules=["q_proj"], layer_replication=[[0, 2], [0, 2]], task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(policy), config).save_pretrained(tmp_path / "one")
    with pytest.raises(ConfigError, match="share one weight"):
        load_policy(tmp_path / "one")


@pytest.mark.parametrize("method", ["sft", "dpo", "remax"])
def test_an_adapter_that_is_multiplied_by_nothing_is_refused(method, policy, tmp_path):
    with pytest.raises(ConfigError, match="lora_alpha: 0 multiplies the adapter of .*q_proj by 0"):
        make(method, policy, tmp_path, lora(target_modules=["q_proj"], lora_alpha=0))


@pytest.mark.parametrize("method", ["sft", "dpo"])
@pytest.mark.parametrize(
    "options, said",
    [
        ({"target_modules": ["q_proj", "v_porj"]}, "target_modules of LoRA: LlamaForCausalLM has no v_porj,.* v_proj"),
        ({"modules_to_save": ["lm_haed"]}, "modules_to_save of LoRA: .* has no lm_haed,.* it has .*lm_head"),
        ({"layers_to_transform": [0, 7]}, "layers_to_transform of LoRA: .* has no 7,.* it has layers 0 to 1"),
        ({"layers_to_transform": 7, "target_modules": {"q_proj"}}, "layers_to_transform"),
        ({"alpha_pattern": {"q_proj": 0}, "target_modules": ["q_proj", "v_proj"]}, "alpha_pattern: 0 multiplies .*q_p"),
        ({"use_qalora": True}, "use_qalora: it is for GPTQ weights alone"),
        ({"kasa_config": KasaConfig()}, "kasa_config: it cuts the frozen weights"),
        ({"monteclora_config": MontecloraConfig()}, "monteclora_config: it needs a loss of its own"),
        ({"task_type": "SEQ_CLS"}, "task_type: SEQ_CLS is not for a language model"),
    ],
)  # fmt: skip
def test_a_part_of_an_adapter_that_would_not_be_trained_is_refused(method, options, said, policy, tmp_path):
    """PEFT adapted what it found, and the rest was left out in silence."""
    with pytest.raises(ConfigError, match=said):
        make(method, policy, tmp_path, lora(**{"target_modules": ["q_proj"], **options}))


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], r".*\.q_proj|lm_head"])
def test_an_adapter_on_the_head_is_refused(targets, policy, tmp_path):
    said = r"target_modules: lm_head is the model's head.*modules_to_save: \[lm_head\]"
    with pytest.raises(ConfigError, match=said):
        make("sft", policy, tmp_path, lora(target_modules=targets))


@pytest.mark.parametrize("method", ["sft", "dpo", "reward", "remax"])
def test_an_adapter_that_changes_its_base_is_refused(method, policy, tmp_path):
    """PiSSA: with the adapter off the model is not the one that training starts from."""
    with pytest.raises(ConfigError, match="init_lora_weights: pissa changes the frozen weights too.* use true"):
        make(method, policy, tmp_path, lora(init_lora_weights="pissa"))


@pytest.mark.parametrize("method", ["sft", "dpo", "reward", "remax"])
def test_an_adapter_that_the_trainers_do_not_know_how_to_train_is_refused(method, policy, tmp_path):
    """AdaLoRA ended in a KeyError: of DPO in the first step, of SFT after its last, with all ranks as they were."""
    config = AdaLoraConfig(target_modules=["q_proj"], total_step=10)
    with pytest.raises(ConfigError, match="type ADALORA cannot be trained here: its ranks are chosen"):
        make(method, policy, tmp_path, config)


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_an_activated_adapter_is_refused(method, policy, tmp_path):
    """Its gradients were 0 in every step, and nothing said so."""
    with pytest.raises(ConfigError, match="alora_invocation_tokens: .* would get no gradient"):
        make(method, policy, tmp_path, lora(alora_invocation_tokens=[3]))


def test_an_adapter_of_a_reward_model_needs_a_place_for_the_head(policy, tmp_path):
    with pytest.raises(ConfigError, match="TrainableTokensConfig has no modules_to_save"):
        make("reward", policy, tmp_path, TrainableTokensConfig(token_indices=[3]))


def test_a_second_adapter_on_experts_is_refused_before_training(tmp_path):
    """`all-linear` means the experts' parameters too, which PEFT says once it has added the adapter."""
    from transformers import MixtralConfig, MixtralForCausalLM

    tokenizer, policy = toy.tokenizer(), tmp_path / "policy"
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    MixtralForCausalLM(
        MixtralConfig(vocab_size=len(tokenizer), num_local_experts=2, num_key_value_heads=2, **sizes)
    ).save_pretrained(policy)
    tokenizer.save_pretrained(policy)
    trained("sft", str(policy), tmp_path / "one", lora(target_modules=["q_proj"]), max_steps=1)
    with pytest.raises(ConfigError, match=r"second one: that one is more .* \(it uses target_parameters\). Leave"):
        make("dpo", str(tmp_path / "one"), tmp_path / "two", lora())


def test_a_base_that_was_changed_in_memory_is_refused(policy, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(policy)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.add_(0.1)
    with pytest.raises(ConfigError, match="layers.1.mlp.up_proj.weight of the model given is not that of"):
        make("sft", model, tmp_path, lora())


def test_an_adapter_over_its_own_base_is_refused(policy, tmp_path):
    shutil.copytree(policy, tmp_path / "base")
    with pytest.raises(ConfigError, match="is the folder of the base model"):
        make("sft", str(tmp_path / "base"), tmp_path / "base", lora())


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_layers_that_are_not_there_are_named_with_those_that_are(method, policy, tmp_path):
    with pytest.raises(ConfigError, match="LoRA cannot be added to .*q_prj.* Its linear layers are .*q_proj"):
        make(method, policy, tmp_path, lora(target_modules=["q_prj"]))
