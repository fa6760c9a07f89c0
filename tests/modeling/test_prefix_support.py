"""Models that carry anything from one answer into the next are refused shared prefixes, in every dtype."""

import pytest
import torch
import transformers as tf
from torch import nn

from align.errors import TrainingError
from align.modeling.prefix_support import check_wrapped, enable_shared_prefix
from align.modeling.shared_prefix import compute_soft_caps
from tests.modeling import tiny
from tests.modeling.pair_models import MODELS

BASE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GQA = {**BASE, "num_key_value_heads": 2}
HYBRIDS = {
    "FalconH1": {**GQA, "head_dim": 8, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8,
                 "mamba_n_groups": 1},
    "Bamba": {**GQA, "attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8,
              "mamba_n_groups": 1},
    "NemotronH": {**GQA, "layers_block_type": ["mamba", "attention"], "mamba_num_heads": 4, "mamba_head_dim": 16,
                  "ssm_state_size": 8, "n_groups": 1, "head_dim": 8},
    "Zamba2": {**GQA, "layers_block_type": ["mamba", "hybrid"], "mamba_d_state": 8, "n_mamba_heads": 4,
               "mamba_ngroups": 1, "num_mem_blocks": 1, "hybrid_layer_ids": [1]},
    "RecurrentGemma": {**GQA, "block_types": ["recurrent", "attention"], "head_dim": 8, "lru_width": 32},
    "Jamba": {**GQA, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4,
              "num_experts": 2, "use_mamba_kernels": False},
    "Lfm2": {**GQA, "layer_types": ["conv", "full_attention"], "conv_L_cache": 3},
    "Qwen3Next": {**GQA, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
                  "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
                  "linear_value_head_dim": 8, "num_experts": 4, "moe_intermediate_size": 16,
                  "shared_expert_intermediate_size": 16},
    "GraniteMoeHybrid": {**GQA, "layer_types": ["mamba", "attention"], "mamba_n_heads": 4, "mamba_d_head": 16,
                         "mamba_d_state": 8, "mamba_n_groups": 1, "num_local_experts": 2, "num_experts_per_tok": 1},
    "MiniMax": {**GQA, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"], "num_local_experts": 2},
    "Mamba2": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8,
               "state_size": 8, "n_groups": 1},
    "Rwkv": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32},
}  # fmt: skip


def hybrid(name):
    torch.manual_seed(0)
    config = getattr(tf, f"{name}Config")(**HYBRIDS[name], pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return getattr(tf, f"{name}ForCausalLM")(config)


@pytest.mark.parametrize("name", HYBRIDS)
def test_hybrids_are_refused_by_what_they_are(name):
    """Without a computation, and so in every dtype."""
    model = hybrid(name).to(torch.bfloat16)
    before = model.config._attn_implementation
    reason = enable_shared_prefix(model, 64)
    assert reason is not None and "move by" not in reason and "differ by" not in reason and "fails" not in reason
    assert model.config._attn_implementation == before


def test_the_message_names_the_module():
    """Falcon-H1 has attention in every layer, and a state beside it."""
    assert "layers.0.mamba" in enable_shared_prefix(hybrid("FalconH1"), 64)


class Shift(nn.Module):
    """Adds a little of the token before, as a state would. No structure gives it away."""

    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def forward(self, hidden):
        return self.mlp(hidden) + 0.02 * nn.functional.pad(hidden, (0, 0, 1, 0))[:, :-1]


@pytest.mark.parametrize("how", ["float32", "bfloat16", "autocast"])
def test_a_small_leak_is_found_in_every_dtype(how):
    torch.manual_seed(0)
    model = tiny.causal(dtype=torch.bfloat16 if how == "bfloat16" else torch.float32)
    autocast = torch.bfloat16 if how == "autocast" else None
    assert enable_shared_prefix(model, 64, autocast) is None
    check_wrapped(model, autocast)
    for layer in model.model.layers:
        layer.mlp = Shift(layer.mlp)
    with pytest.raises(TrainingError, match="move by .* with the chosen ones.* Set batching: padded"):
        check_wrapped(model, autocast)
    assert "move by" in enable_shared_prefix(model, 64, autocast)


@pytest.mark.parametrize("name", MODELS)
def test_healthy_models_are_accepted_in_half_precision(name):
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(MODELS[name]())
    compute_soft_caps(model)  # as align.modeling.load does
    assert enable_shared_prefix(model.to(torch.bfloat16), 32) is None
    assert enable_shared_prefix(model.float(), 32, torch.bfloat16) is None
