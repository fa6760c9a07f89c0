"""Tiny models made on the spot, float64 and without dropout unless asked otherwise."""

import torch
import transformers as tf

from align.modeling.shared_prefix import compute_soft_caps

VOCAB, PAD, EOS = 40, 0, 1
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "initializer_range": 0.5,
}


def causal(kind: str = "llama", seed: int = 0, dtype=torch.float64, **options):
    """llama (takes options), gemma2 (soft cap), granite (logits divided), cohere, falcon_h1 or
    hyperclovax (multiplied; cohere's head is tied), recurrent_gemma (soft cap by another name) or gpt2."""
    torch.manual_seed(seed)
    config = {
        "llama": lambda: tf.LlamaConfig(**{**SIZES, **options}),
        "gemma2": lambda: tf.Gemma2Config(**SIZES, final_logit_softcapping=3.0),
        "granite": lambda: tf.GraniteConfig(**SIZES, logits_scaling=4.0),
        "cohere": lambda: tf.CohereConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}, logit_scale=0.25),
        "hyperclovax": lambda: tf.HyperCLOVAXConfig(**SIZES, logits_scaling=4.0),
        "falcon_h1": lambda: tf.FalconH1Config(
            **SIZES, lm_head_multiplier=0.25, mamba_d_ssm=16, mamba_n_heads=2, mamba_d_head=8, mamba_d_state=8,
            mamba_n_groups=1,
        ),
        "recurrent_gemma": lambda: tf.RecurrentGemmaConfig(
            **SIZES, logits_soft_cap=3.0, block_types=["recurrent", "attention"], lru_width=16,
        ),
        "gpt2": lambda: tf.GPT2Config(
            vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=EOS, eos_token_id=EOS,
            initializer_range=0.5,
        ),
    }[kind]()  # fmt: skip
    model = tf.AutoModelForCausalLM.from_config(config)
    compute_soft_caps(model)  # as align.modeling.load does
    return model.to(dtype).eval()


def classifier(kind: str = "llama", seed: int = 0, dtype=torch.float64, **options):
    """llama (causal, score on every token) or bert (encoder, pooled)."""
    torch.manual_seed(seed)
    if kind == "llama":
        config = tf.LlamaConfig(**{**SIZES, **options}, num_labels=1)
    else:
        sizes = {k: v for k, v in SIZES.items() if k not in ("num_key_value_heads", "head_dim", "bos_token_id")}
        config = tf.BertConfig(**{**sizes, **options}, num_labels=1)
    return tf.AutoModelForSequenceClassification.from_config(config).to(dtype).eval()


def rows(lengths=(7, 3, 5), seed=0, side="right"):
    """Random token ids padded on one side: input_ids, attention_mask [B, T]."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids, mask = torch.full((len(lengths), width), PAD), torch.zeros(len(lengths), width, dtype=torch.long)
    for i, n in enumerate(lengths):
        where = slice(0, n) if side == "right" else slice(width - n, width)
        ids[i, where] = torch.randint(2, VOCAB, (n,), generator=generator)
        mask[i, where] = 1
    return ids, mask
