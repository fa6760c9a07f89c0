"""A padded batch of pairs of random tokens, and the models that masks are tested on."""

import torch
import transformers as tf

from align.data.collate import PairCollator
from tests.modeling import tiny

PROMPTS, CHOSEN, REJECTED = (3, 5, 2), (4, 1, 6), (2, 5, 3)


def rows(seed=0, prompts=PROMPTS, chosen=CHOSEN, rejected=REJECTED) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)

    def ids(count):
        return torch.randint(2, tiny.VOCAB, (count,), generator=generator).tolist()

    return [
        {"prompt_ids": ids(a), "chosen_ids": ids(b), "rejected_ids": ids(c)}
        for a, b, c in zip(prompts, chosen, rejected, strict=True)
    ]


def pairs(**options) -> dict:
    return PairCollator(tiny.PAD)(rows(**options))


def model(kind="llama", seed=0, **options):
    """As `tiny.causal`, and qwen3 (norms query and key) and gpt_neox (parallel or not, half of a head rotated)."""
    sizes = {k: v for k, v in tiny.SIZES.items() if k not in ("num_key_value_heads", "head_dim")}
    configs = {
        "qwen3": lambda: tf.Qwen3Config(**{**tiny.SIZES, **options}),
        "gpt_neox": lambda: tf.GPTNeoXConfig(**{**sizes, "rotary_pct": 0.5, **options}),
    }
    if kind not in configs:
        return tiny.causal(kind, seed, **options)
    torch.manual_seed(seed)
    return tf.AutoModelForCausalLM.from_config(configs[kind]()).double().eval()
