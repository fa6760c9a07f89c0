"""The count of a step's arithmetic, where what it must be is known."""

import pytest
from datasets import Dataset

from benchmarks.dpo_vs_trl import make_model, text_tokenizer
from benchmarks.pair_roofline import arguments, counted, of_ours, of_trl

PROMPT = "one two three four " * 40
PAIRS = [{"prompt": PROMPT, "chosen": " five", "rejected": " six"}] * 4


def test_long_prompts_cost_trl_twice(tmp_path):
    tokenizer = text_tokenizer([PROMPT + " five six"], 300)
    make_model(tmp_path, tokenizer, 64, 2)
    pairs = Dataset.from_list(
        [
            row | {f"{name}_ids": tokenizer(row[name] + "</s>" * (name != "prompt"))["input_ids"] for name in row}
            for row in PAIRS
        ]
    )
    args = arguments().parse_args([str(tmp_path), "--full", "--pairs", "1"])
    ours, trl = (counted(make, args, pairs, 1) for make in (of_ours, of_trl))
    length = len(pairs[0]["prompt_ids"]) + 2
    token = 2 * (2 * 4 * 64 * 64 + 2 * 3 * 64 * 128 + 4 * 64 * length)  # forward, of two layers: linear, and attention
    body, head = 4 * token * 2 * length, 4 * 2 * 64 * len(tokenizer) * 2 * length  # reference, pass, twice that back
    assert body < trl < body + head
    assert trl / ours == pytest.approx(2, rel=0.1)
