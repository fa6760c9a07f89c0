"""A process that FSDP2 sends its shards holds no whole model: no policy, reference, critic or reward model."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from align.distributed.shells import copied, fill, is_shell
from align.modeling.load import freeze_copy, load_backbone, load_policy, load_sequence_classifier
from align.trainers.on_policy.critic import make_critic
from align.trainers.pairs.reference import load_reference
from align.trainers.ppo import PPOConfig


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> str:
    """50 million parameters: 200 MB."""
    folder = tmp_path_factory.mktemp("larger")
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "vocab_size": 64}
    LlamaForCausalLM(LlamaConfig(num_attention_heads=8, pad_token_id=0, **sizes)).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def second(monkeypatch, tmp_path):
    """This process takes itself for the second of its machine under `configs/accelerate/fsdp2.yaml`."""
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_RANK", "1")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def shells(model) -> float:
    """The share of the parameters, by size, that take no memory."""
    sizes = [(p.numel(), is_shell(p)) for p in model.parameters()]
    return sum(size for size, empty in sizes if empty) / sum(size for size, _ in sizes)


def test_what_fsdp_shards_takes_no_memory(saved, second, tmp_path):
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = resident("VmRSS")
    policy = load_policy(saved, sharded=True)
    reference, halved = freeze_copy(policy), freeze_copy(policy, torch.bfloat16)
    named = load_reference(saved, policy)
    critic = make_critic(policy, PPOConfig(str(tmp_path), report_to="none"), heads=1)
    assert resident("VmHWM") - before < 0.5 * 4 * 50e6  # all five together, of 200 MB each
    for model in (policy, reference, halved, named, critic.backbone, load_backbone(saved, sharded=True)):
        assert shells(model) > 0.999
    assert next(halved.parameters()).dtype == torch.bfloat16 and not any(
        p.requires_grad for p in reference.parameters()
    )
    assert all(p.requires_grad for p in policy.parameters())
    assert policy(torch.tensor([[1, 2]])).logits.shape == (1, 2, 64)  # checks that all processes make can run
    classifier = load_sequence_classifier(saved, sharded=True, head_seed=3)
    assert shells(classifier) > 0.999 and classifier.score.weight.std() > 0
    whole = load_policy(saved)  # for what is not sharded, such as a reward
    assert shells(whole) == 0 and whole.lm_head.weight.std() > 0


def test_an_adapter_is_merged_and_added_to_what_has_no_memory(saved, second, tmp_path):
    adapted = get_peft_model(load_policy(saved, sharded=True), LoraConfig(r=4, target_modules="all-linear"))
    assert shells(adapted) > 0.9
    adapted.save_pretrained(tmp_path)
    merged = load_policy(str(tmp_path), sharded=True)
    assert merged.lm_head.weight.shape == (64, 512)


def test_a_copy_is_a_copy():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 2), "b": torch.nn.Linear(2, 2)})
    model["tied"] = model["b"]
    twin = copied(model, torch.bfloat16)
    assert twin["tied"].weight is twin["b"].weight and twin["a"].weight.dtype == torch.bfloat16
    model["a"].weight.data = torch.zeros(()).expand(2, 3)
    again = copied(model)
    assert is_shell(again["a"].weight) and torch.equal(again["b"].weight, model["b"].weight)
    with torch.no_grad():
        again["b"].weight.zero_()
    assert model["b"].weight.any()
    fill(model)
    with torch.no_grad():
        model["a"].weight[0, 0] = 1.0
    assert model["a"].weight.sum() == 1 and again["a"].weight.sum() == 0


def resident(name: str) -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


def test_a_copy_of_a_model_that_trl_has_patched_computes_with_its_own_weights(saved, tmp_path):
    """`SFTTrainer(...).model` into the next trainer, as scripts do it."""
    from trl.trainer.utils import add_fused_lm_head as patch

    model = load_policy(saved)
    patch(model)
    twin, ids = freeze_copy(model), torch.tensor([[1, 2, 3]])
    before = twin(ids).logits
    torch.testing.assert_close(before, model(ids).logits, rtol=0, atol=0)
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0)
    assert torch.equal(twin(ids).logits, before) and not torch.equal(model(ids).logits, before)
