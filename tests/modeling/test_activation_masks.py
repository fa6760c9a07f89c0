"""MaPO's masks against activations that are computed by hand, layer by layer."""

import pytest
import torch

from align.errors import ConfigError
from align.modeling.activation_masks import GROUPS, groups_of, min_max, watch_activations
from align.modeling.pairs import completions, pair_tokens
from tests.modeling import tiny
from tests.modeling.pair_batches import model, pairs

CASES = {
    "llama": {},
    "qwen3": {},
    "gpt_neox": {"use_parallel_residual": True},
    "gpt_neox, sequential": {"use_parallel_residual": False},
    "gpt2": {},
}


def ours(core, batch, groups=GROUPS, chunk_size=2):
    with torch.no_grad(), watch_activations(core, completions(batch), groups) as seen:
        for _ in range(2):  # the last of several passes counts
            pair_tokens(core, batch, chunk_size=chunk_size)
    return seen.mask()


def run_and_see_attention(core, batch):
    """(query, key, value, output) of every layer, and the model's output."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    seen, sdpa = [], ALL_ATTENTION_FUNCTIONS["sdpa"]

    def record(module, query, key, value, *args, **kwargs):
        output = sdpa(module, query, key, value, *args, **kwargs)
        seen.append((query, key, value, output[0]))
        return output

    ALL_ATTENTION_FUNCTIONS["sdpa"] = record
    try:
        with torch.no_grad():
            ids, mask = batch["input_ids"], batch["attention_mask"]
            out = core(ids, attention_mask=mask, output_hidden_states=True)
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]  # what was set on top of transformers' own
    return seen, out


def by_hand(core, batch) -> dict[str, list[torch.Tensor]]:
    """Every activation [rows, T, features], from the hidden states between the layers and the modules' own functions.
    What attention gets and gives is read where transformers calls the attention function."""
    seen, out = run_and_see_attention(core, batch)
    found = {group: [] for group in GROUPS}
    hidden, kind = out.hidden_states, core.config.model_type
    layers = {"gpt_neox": "gpt_neox.layers", "gpt2": "transformer.h"}.get(kind, "model.layers")
    found["resid"].append(hidden[0])
    with torch.no_grad():
        for block, h, (query, key, value, z) in zip(core.get_submodule(layers), hidden, seen, strict=False):
            query, key, value = (x.transpose(1, 2).flatten(-2) for x in (query, key, value))
            z = z.flatten(-2)
            if kind == "gpt2":
                x = block.ln_1(h)
                attention, second_norm, mlp = block.attn.c_proj(z), block.ln_2, block.mlp
                found["attn"] += [query, key, value, z]  # no rotation
            elif kind == "gpt_neox":
                x = block.input_layernorm(h)
                attention, second_norm, mlp = block.attention.dense(z), block.post_attention_layernorm, block.mlp
                joint = block.attention.query_key_value(x).view(*x.shape[:2], 2, 3, 8)
                found["attn"] += [*(joint[:, :, :, i].flatten(-2) for i in range(3)), query, key, z]
            else:
                x = block.input_layernorm(h)
                attention, second_norm, mlp = block.self_attn.o_proj(z), block.post_attention_layernorm, block.mlp
                before = [block.self_attn.q_proj(x), block.self_attn.k_proj(x)]
                if kind == "qwen3":
                    norms = block.self_attn.q_norm, block.self_attn.k_norm
                    before = [
                        norm(p.view(*x.shape[:2], 2, 8)).flatten(-2) for norm, p in zip(norms, before, strict=True)
                    ]
                found["attn"] += [*before, value, query, key, z]
            middle = h + attention
            y = second_norm(h if kind == "gpt_neox" and core.config.use_parallel_residual else middle)
            if kind == "gpt2":
                inner = mlp.act(mlp.c_fc(y))
                delta = mlp.c_proj(inner)
            elif kind == "gpt_neox":
                inner = mlp.act(mlp.dense_h_to_4h(y))
                delta = mlp.dense_4h_to_h(inner)
            else:
                inner = mlp.act_fn(mlp.gate_proj(y)) * mlp.up_proj(y)
                delta = mlp.down_proj(inner)
            found["mlp"].append(inner)
            found["resid"] += [h, x, attention, middle, y, delta, middle + delta]
    found["resid"].append(hidden[-1])
    found["logits"].append(out.logits)
    return found


def expected(core, batch, groups=GROUPS):
    means = []
    for group, activations in by_hand(core, batch).items():
        if group not in groups:
            continue
        scaled = torch.zeros(len(activations), *completions(batch).mask.shape, dtype=torch.float64)
        for number, x in enumerate(activations):
            for row, wanted in enumerate(batch["completion_mask"].bool()):
                values = x[row].mean(-1).roll(1)[wanted]  # at the position before the token
                spread = values.max() - values.min()
                scaled[number, row, : len(values)] = (values - values.min()) / spread if spread > 1e-14 else 1
        means.append(scaled.mean(0))
    return torch.stack(means).mean(0)


@pytest.mark.parametrize("case", CASES)
def test_every_group_is_the_one_computed_by_hand(case):
    core, batch = model(case.split(",")[0], **CASES[case]), pairs()
    counts = {"mlp": 2, "attn": 8 if case == "gpt2" else 12, "resid": 16, "logits": 1}
    assert {group: len(found) for group, found in by_hand(core, batch).items()} == counts
    for group in GROUPS:
        torch.testing.assert_close(ours(core, batch, (group,)), expected(core, batch, (group,)), msg=group)
    mask = ours(core, batch)
    torch.testing.assert_close(mask, expected(core, batch))
    assert mask.min() >= 0 and mask.max() <= 1 and not mask.requires_grad


def test_a_mask_depends_on_no_neighbour_and_no_padding():
    core, batch = model(), pairs()
    together = ours(core, batch)
    alone = ours(core, pairs(prompts=(3,), chosen=(4,), rejected=(2,)))  # the same random tokens come first
    torch.testing.assert_close(alone[0], together[0, : alone.shape[1]])


def test_hooks_are_gone_afterwards():
    core = model()
    ours(core, pairs())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in core.modules())


def test_an_adapter_is_looked_through():
    from peft import LoraConfig, get_peft_model

    from align.modeling.load import Reference
    from align.modeling.logprobs import language_model

    batch = pairs()
    plain = ours(model(), batch)
    lora = LoraConfig(target_modules=["q_proj", "down_proj", "o_proj"], init_lora_weights=False)
    policy = get_peft_model(model(), lora)
    with Reference(policy, adapter_off=True).active() as core:
        torch.testing.assert_close(ours(language_model(core), batch), plain)
    assert not torch.allclose(ours(language_model(policy), batch), plain)


def test_half_precision():
    core, batch = model(), pairs()
    exact, half = ours(core, batch), ours(core.bfloat16(), batch)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), exact, atol=0.1, rtol=0)


def test_min_max():
    values = torch.tensor([[2.0, 4.0, 3.0, 99.0], [5.0, 5.0, 0.0, 0.0], [-7.0, 0.0, 0.0, 0.0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]])
    expected = torch.tensor([[0, 1, 0.5, 0], [1, 1, 0, 0], [1, 0, 0, 0]])
    assert torch.equal(min_max(values, mask), expected)
    assert min_max(values, mask, noise=2.0).tolist() == mask.float().tolist()


def test_an_unknown_architecture_or_group_says_so():
    with (
        pytest.raises(ConfigError, match="not known for the architecture 'gemma2'.*llama, mistral, qwen2"),
        watch_activations(tiny.causal("gemma2"), completions(pairs())),
    ):
        pass
    assert groups_of("all") == GROUPS and groups_of("attn") == ("attn",)
    with pytest.raises(ConfigError, match="no activations 'heads'; they are all, mlp, attn, resid, logits"):
        groups_of("heads")
