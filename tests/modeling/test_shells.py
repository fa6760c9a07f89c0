"""A process that FSDP2 sends its shards holds no whole model: no policy, reference, critic or reward model."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from transformers import LlamaConfig, LlamaForCausalLM

from align.distributed.shells import check_sharded, copied, fill, is_shell
from align.errors import ConfigError
from align.modeling.load import freeze_copy, load_policy
from tests.warm import run_ranks


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> str:
    """50 million parameters: 200 MB."""
    folder = tmp_path_factory.mktemp("larger")
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "vocab_size": 64}
    LlamaForCausalLM(LlamaConfig(num_attention_heads=8, pad_token_id=0, **sizes)).save_pretrained(folder)
    return str(folder)


def test_what_fsdp_shards_takes_no_memory(saved, tmp_path):
    """In a process of its own, which takes itself for the second of its machine."""
    run_ranks("tests.modeling.shell_ranks", saved, str(tmp_path), logs=tmp_path / "logs", count=1)


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


def test_sharding_that_accelerate_leaves_out_is_an_error(monkeypatch):
    """As it does on processors: the processes but the first would go on with zeros."""
    fsdp, processors = (
        SimpleNamespace(num_processes=2, distributed_type=kind)
        for kind in (DistributedType.FSDP, DistributedType.MULTI_CPU)
    )
    check_sharded(processors)  # nobody asked for it
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    check_sharded(fsdp)
    with pytest.raises(ConfigError, match="accelerate trains on CPUs here, where it leaves FSDP out"):
        check_sharded(processors)
