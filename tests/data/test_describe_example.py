import pytest
from datasets import Dataset

from align.data import describe_example, tokenize_completions, tokenize_pairs, tokenize_prompts

PAIR = {"prompt": "Human: hi\n\nAssistant:", "chosen": " yes", "rejected": " no [x]"}


def test_a_pair(tokenizer):
    (row,) = tokenize_pairs(Dataset.from_list([PAIR]), tokenizer, max_length=99)
    counts = [len(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
    assert describe_example(row, tokenizer, "pairs").splitlines() == [
        f"row 0: {sum(counts)} tokens, {counts[1]} and {counts[2]} trained",
        f"prompt ({counts[0]} tokens)",
        "  context | <bos>Human: hi\\n",
        "  context | \\n",
        "  context | Assistant:",
        f"chosen ({counts[1]} tokens, ends with <eos>)",
        "  trained |  yes<eos>",
        f"rejected ({counts[2]} tokens, ends with <eos>)",
        "  trained |  no [x]<eos>",
    ]


def test_a_cut_completion(tokenizer):
    row = {"prompt": "hi", "completion": " yes yes"}
    (row,) = tokenize_completions(Dataset.from_list([row]), tokenizer, max_length=4)
    assert describe_example(row, tokenizer, "completions").splitlines() == [
        "row 0: 4 tokens, 1 trained",
        "context (3 tokens)",
        "  context | <bos>hi",
        "trained (1 tokens, no end token)",
        "  trained |  yes",
    ]


def test_a_prompt_and_a_long_text(tokenizer):
    (row,) = tokenize_prompts(Dataset.from_list([{"prompt": "x" * 5000}]), tokenizer, max_prompt_length=None)
    text = describe_example(row, tokenizer, "prompts")
    assert text.startswith("row 0: 5001 tokens, the rollouts start here\nprompt (5001 tokens)\n  context | <bos>xxx")
    assert "3005 characters left out" in text and len(text) < 2300


def test_an_unknown_kind(tokenizer):
    with pytest.raises(ValueError, match="'prompts', 'completions', 'pairs', 'ranked' or 'unpaired'"):
        describe_example({}, tokenizer, "pair")
