"""Tiny models of several architectures, exact enough for 1e-9, and pairs with every kind of common beginning."""

import torch
import transformers as tf
from torch import nn

from align.modeling.shared_prefix import compute_soft_caps
from tests.modeling import tiny

SIZES = tiny.SIZES
MODELS = {
    "llama": lambda: tf.LlamaConfig(**SIZES),
    "grouped queries": lambda: tf.LlamaConfig(**{**SIZES, "num_attention_heads": 4, "head_dim": 4}),
    "qwen2": lambda: tf.Qwen2Config(**{k: v for k, v in SIZES.items() if k != "head_dim"}),
    "qwen3": lambda: tf.Qwen3Config(**SIZES),
    "gpt2": lambda: tf.GPT2Config(
        vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.5, bos_token_id=1,
        eos_token_id=1,
    ),
    "neox": lambda: tf.GPTNeoXConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=64, initializer_range=0.5,
    ),
    "gemma2": lambda: tf.Gemma2Config(**SIZES, final_logit_softcapping=3.0, sliding_window=32),
    "mixture of experts": lambda: tf.Qwen3MoeConfig(
        **SIZES, moe_intermediate_size=8, num_experts=4, num_experts_per_tok=2, decoder_sparse_step=1
    ),
}  # fmt: skip


def make(name, dtype=torch.float64):
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(MODELS[name]())
    compute_soft_caps(model)  # as align.modeling.load does
    return exact(model, dtype)


def make_classifier(name):
    """float64, with one score."""
    torch.manual_seed(0)
    config = MODELS[name]()
    config.num_labels, config.pad_token_id = 1, tiny.PAD
    return exact(tf.AutoModelForSequenceClassification.from_config(config), torch.float64)


def exact(model, dtype):
    model = model.to(dtype).eval()
    for module in list(model.modules()):  # transformers normalises in float32, whatever the model's type
        for child, norm in module.named_children():
            if type(norm).__name__ in ("LlamaRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"):
                setattr(module, child, nn.RMSNorm(len(norm.weight), norm.variance_epsilon, dtype=dtype))
    return model


def pairs(seed=0):
    """Usual pairs; a common beginning of the completions; a completion that is the beginning of the other; 1 token."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(2, tiny.VOCAB, (n,), generator=generator).tolist()  # noqa: E731
    rows = [
        {"prompt_ids": draw(p), "chosen_ids": draw(c), "rejected_ids": draw(r)}
        for p, c, r in ((9, 4, 6), (2, 5, 3), (5, 4, 7), (6, 3, 5), (1, 1, 1))
    ]
    rows[1]["rejected_ids"][:2] = rows[1]["chosen_ids"][:2]
    rows[2]["rejected_ids"][:4] = rows[2]["chosen_ids"]
    rows[3]["chosen_ids"] = rows[3]["rejected_ids"][:1]
    rows.append({**rows[3], "chosen_ids": rows[3]["rejected_ids"], "rejected_ids": rows[3]["chosen_ids"]})
    return rows
