"""Pairs in one row: the log-probs and gradients of padded batches, for several architectures and wrappings."""

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn

from align.data import PairCollator, SharedPrefixCollator
from align.errors import TrainingError
from align.modeling import shared_prefix
from align.modeling.load import load_policy
from align.modeling.logprobs import language_model, token_logps
from align.modeling.pairs import pair_tokens
from align.modeling.prefix_support import enable_shared_prefix
from tests.modeling import tiny
from tests.modeling.pair_models import MODELS, make, pairs


def gradients(model, batch, weights):
    model.zero_grad()
    tokens = pair_tokens(model, batch)
    nn.functional.logsigmoid((tokens.logps * weights).sum(-1)).sum().backward()
    return tokens, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(model, atol, dtype=torch.float64):
    rows = pairs()
    padded, shared = PairCollator(tiny.PAD)(rows), SharedPrefixCollator()(rows)
    weights = torch.randn(2 * len(rows), 7, dtype=dtype, generator=torch.Generator().manual_seed(1)) / 3
    expected, expected_gradients = gradients(model, padded, weights)
    actual, actual_gradients = gradients(model, shared, weights)
    assert torch.equal(actual.mask, expected.mask) and shared["input_ids"].numel() < padded["input_ids"].numel() / 2
    torch.testing.assert_close(actual.logps, expected.logps, rtol=0, atol=atol)
    assert expected_gradients.keys() == actual_gradients.keys() and expected_gradients
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(
            actual_gradients[name], gradient, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("name", MODELS)
def test_equals_padded_batches(name):
    dtype = torch.float32 if name == "mixture of experts" else torch.float64
    model = make(name, dtype)
    assert enable_shared_prefix(model, max_length=32) is None
    assert_same(model, atol={"mixture of experts": 2e-5, "gemma2": 1e-5}.get(name, 1e-9), dtype=dtype)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "neox"])
def test_gradient_checkpointing(name, reentrant):
    model = make(name).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert enable_shared_prefix(model, None) is None and model.training
    assert_same(model, atol=1e-9)


@pytest.mark.parametrize("name", ["llama", "neox"])
def test_adapters(name):
    targets = {"llama": ["q_proj", "v_proj", "up_proj"], "neox": ["query_key_value", "dense"]}[name]
    model = get_peft_model(make(name), LoraConfig(r=2, target_modules=targets, init_lora_weights=False)).double()
    assert enable_shared_prefix(model, None) is None
    assert_same(model, atol=1e-9)


def test_mixed_precision():
    model = make("llama", torch.float32)
    assert enable_shared_prefix(model, None) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(model, atol=0.15, dtype=torch.float32)


def test_float32():
    model = make("llama", torch.float32)
    assert enable_shared_prefix(model, None) is None
    assert_same(model, atol=2e-5, dtype=torch.float32)


def test_the_model_does_everything_else_as_before(tmp_path):
    model, (ids, mask) = make("llama", torch.float32), tiny.rows(side="left")
    before = (
        model(input_ids=ids, attention_mask=mask).logits,
        model.generate(ids, attention_mask=mask, max_new_tokens=5),
    )
    assert enable_shared_prefix(model, None) is None
    after = model(input_ids=ids, attention_mask=mask).logits, model.generate(ids, attention_mask=mask, max_new_tokens=5)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    model.save_pretrained(tmp_path)
    assert "shared_prefix" not in (tmp_path / "config.json").read_text()


def mistral(window):
    sizes = {k: v for k, v in tiny.SIZES.items() if k != "head_dim"}
    return tf.AutoModelForCausalLM.from_config(tf.MistralConfig(**sizes, sliding_window=window))


def alibi():
    config = tf.FalconConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, alibi=True, bos_token_id=1,
        eos_token_id=1,
    )  # fmt: skip
    return tf.AutoModelForCausalLM.from_config(config)


UNSUITABLE = {
    "takes no position ids": lambda: tf.AutoModelForCausalLM.from_config(
        tf.MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, state_size=4)
    ),
    "encoder-decoder": lambda: tf.AutoModelForSeq2SeqLM.from_config(
        tf.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    ),
    "attention window of 8 tokens is shorter than max_length=64": lambda: mistral(8),
    "its attention is eager": lambda: tf.AutoModelForCausalLM.from_config(
        tf.LlamaConfig(**tiny.SIZES), attn_implementation="eager"
    ),
    "attention interface": alibi,
    "virtual tokens": lambda: get_peft_model(
        tf.AutoModelForCausalLM.from_config(tf.LlamaConfig(**tiny.SIZES)),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    ),
}


@pytest.mark.parametrize("reason", UNSUITABLE)
def test_models_that_cannot_are_told_apart(reason):
    torch.manual_seed(0)
    model = UNSUITABLE[reason]()
    core = language_model(model)
    before = core.config._attn_implementation
    assert reason in enable_shared_prefix(model, max_length=64)
    assert core.config._attn_implementation == before


def test_a_window_that_covers_every_sequence_is_none():
    model = mistral(64)
    assert "max_length=None" in enable_shared_prefix(model, None)
    assert enable_shared_prefix(model, max_length=64) is None
    long = [{"prompt_ids": [5] * 60, "chosen_ids": [6] * 3, "rejected_ids": [7] * 5}]
    with pytest.raises(TrainingError, match="65 tokens is longer than the model's attention window of 64"):
        pair_tokens(model, SharedPrefixCollator()(long))


def test_the_check_computes(monkeypatch):
    """A model that looks suitable and mixes the completions is found out, and left as it was."""
    model = make("llama")

    def wrong(query, key, value, segments, **options):
        return nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)

    monkeypatch.setattr(shared_prefix, "group_by_group", wrong)
    assert "move by" in enable_shared_prefix(model, None)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_mask():
    """The mask of the CUDA path, entry by entry."""
    table = torch.tensor([[[[2, 1, 2], [1, 2, 0]]]])
    seen = shared_prefix.visible(table)
    n = int(table.sum())
    actual = seen(0, 0, torch.arange(n)[:, None], torch.arange(n)).int().tolist()
    assert actual == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 0, 1, 0, 0, 0, 0],
        [1, 1, 0, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1, 1, 1],
    ]
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = torch.randn(3, 1, 2, n, 8)
    expected = shared_prefix.group_by_group(q, k, v, shared_prefix._segments(table))
    actual = flex_attention(q, k, v, block_mask=shared_prefix.block_mask(table))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


# ---- what attention does besides -------------------------------------------------------------------------------------


def gemma2(implementation, dtype=torch.float64):
    torch.manual_seed(0)
    config = tf.Gemma2Config(**tiny.SIZES, attn_logit_softcapping=1.0, query_pre_attn_scalar=8, sliding_window=32)
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    return model.to(dtype).eval()


def test_soft_capped_attention(tmp_path):
    """A folder of Gemma-2 is loaded with its cap, padded and shared, as in eager attention."""
    gemma2("eager", torch.float32).save_pretrained(tmp_path)
    model, eager = load_policy(tmp_path), gemma2("eager", torch.float32)
    ids, mask = tiny.rows()
    expected = token_logps(eager, ids, mask)
    torch.testing.assert_close(token_logps(model, ids, mask), expected, rtol=0, atol=1e-4)
    without = load_policy(tmp_path, attn_implementation="eager")
    without.config.attn_logit_softcapping = None
    for layer in without.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    assert (token_logps(without, ids, mask) - expected).abs().max() > 0.01
    ids, mask = tiny.rows(side="left")
    assert torch.equal(
        *(m.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False) for m in (model, eager))
    )
    assert enable_shared_prefix(model, 32) is None
    assert_same(model, atol=1e-4, dtype=torch.float32)


def test_one_dtype_under_autocast(monkeypatch):
    """Rotary embeddings make queries and keys float32 beside values in bfloat16; FlexAttention would refuse them."""
    model, seen = make("llama", torch.float32), []
    assert enable_shared_prefix(model, None) is None
    original = shared_prefix.group_by_group

    def spy(query, key, value, segments, **options):
        seen.append({query.dtype, key.dtype, value.dtype})
        return original(query, key, value, segments, **options)

    monkeypatch.setattr(shared_prefix, "group_by_group", spy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pair_tokens(model, SharedPrefixCollator()(pairs()))
    assert seen == [{torch.bfloat16}] * 2


def test_attention_dropout():
    """Kept where it is wanted: SDPA computes it in shared rows."""
    config = tf.LlamaConfig(**tiny.SIZES, attention_dropout=0.5)
    model = tf.AutoModelForCausalLM.from_config(config).train()
    assert enable_shared_prefix(model, None) is None
    batch = SharedPrefixCollator()(pairs())
    first, second = (pair_tokens(model, batch).logps for _ in range(2))
    assert not torch.equal(first, second)
