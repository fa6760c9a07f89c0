import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model

from align.data import PairCollator
from align.modeling.dropout import disable_dropout
from align.modeling.pairs import at_completions, completions, pair_tokens
from tests.modeling import tiny


def features(shapes=((5, 3, 6), (2, 4, 1), (7, 2, 2)), seed=0):
    """Pairs of random tokens; shapes: lengths of prompt, chosen, rejected."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(2, tiny.VOCAB, (n,), generator=generator).tolist()  # noqa: E731
    return [
        {"prompt_ids": draw(p), "chosen_ids": [*draw(c - 1), tiny.EOS], "rejected_ids": draw(r)} for p, c, r in shapes
    ]


def test_padded_log_probs_row_by_row():
    model, pairs = tiny.causal(), features()
    batch = PairCollator(tiny.PAD)(pairs)
    tokens = pair_tokens(model, batch, chunk_size=3)
    assert tokens.logps.shape == tokens.mask.shape == (6, 6) and tokens.kl is None
    for i, (name, pair) in enumerate((n, p) for n in ("chosen_ids", "rejected_ids") for p in pairs):
        ids, start = torch.tensor([pair["prompt_ids"] + pair[name]]), len(pair["prompt_ids"])
        logps = model(input_ids=ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[start - 1 :, 0]
        assert tokens.mask[i].sum() == len(logps) and tokens.mask[i, : len(logps)].all()
        torch.testing.assert_close(tokens.logps[i, : len(logps)], logps, rtol=0, atol=1e-9)
        assert tokens.logps[i, len(logps) :].eq(0).all()
    assert tokens.logps.requires_grad


def test_completion_tokens_and_what_predicts_them():
    pairs = features()
    batch = PairCollator(tiny.PAD)(pairs)
    places = completions(batch)
    for i, (name, pair) in enumerate((n, p) for n in ("chosen_ids", "rejected_ids") for p in pairs):
        assert places.ids[i][places.mask[i]].tolist() == pair[name]
    before = at_completions(batch["input_ids"], places)
    assert before[0, :4].tolist() == [pairs[0]["prompt_ids"][-1], *pairs[0]["chosen_ids"][:2], 0]
    wide = at_completions(torch.randn(6, batch["input_ids"].shape[1], 4), places)
    assert wide.shape == (6, 6, 4) and wide[~places.mask].eq(0).all() and wide[places.mask].ne(0).all()


def test_no_dropout_is_left_in_attention():
    """Llama keeps its rate as a number of the layer, not as a module."""
    model, batch = tiny.causal("llama", attention_dropout=0.5).train(), PairCollator(tiny.PAD)(features())
    assert not torch.equal(pair_tokens(model, batch).logps, pair_tokens(model, batch).logps)
    disable_dropout(model)
    expected = pair_tokens(model.eval(), batch).logps
    torch.testing.assert_close(pair_tokens(model.train(), batch).logps, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["opt", "gpt2", "llama with an adapter"])
def test_every_dropout_is_disabled(kind, caplog):
    """Numbers that OPT hands to functions, its layerdrop, modules, and those of an adapter, which are said."""
    sizes = {"vocab_size": tiny.VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = {
        "opt": lambda: tf.OPTConfig(**sizes, ffn_dim=16, word_embed_proj_dim=16, dropout=0.5, layerdrop=0.5),
        "gpt2": lambda: tf.GPT2Config(vocab_size=tiny.VOCAB, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.5),
        "llama with an adapter": lambda: tf.LlamaConfig(**tiny.SIZES),
    }[kind]()
    model = tf.AutoModelForCausalLM.from_config(config)
    if kind == "llama with an adapter":
        lora = LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5, init_lora_weights=False)
        model = get_peft_model(model, lora)
    batch = PairCollator(tiny.PAD)(features())
    model.train()
    assert not torch.equal(pair_tokens(model, batch).logps, pair_tokens(model, batch).logps)
    disable_dropout(model)
    assert torch.equal(pair_tokens(model, batch).logps, pair_tokens(model, batch).logps)
    assert ("lora_dropout 0.5 is off" in caplog.text) == (kind == "llama with an adapter")
