"""Every example of docs/data.md is data that its command takes."""

import re
from pathlib import Path

import pytest
from datasets import Dataset

import align.data

DOCS = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```jsonl (\w+)\n(.*?)```", DOCS, re.DOTALL)
LIMITS = {use: {"max_length": 200} for use in ("pairs", "completions", "ranked", "unpaired")}
LIMITS["prompts"] = {"max_prompt_length": 200}


def test_there_are_examples_of_every_use():
    assert {use for use, _ in EXAMPLES} == set(LIMITS)


@pytest.mark.parametrize("use, lines", EXAMPLES)
def test_an_example_of_the_documentation(use, lines, tmp_path, chat_tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text(lines)
    tokenize = getattr(align.data, f"tokenize_{use}")
    rows = tokenize(align.data.load_rows(path), chat_tokenizer, **LIMITS[use])
    assert len(rows) == len(lines.splitlines())
    assert align.data.describe_example(rows[0], chat_tokenizer, use)


def test_the_printed_example_is_what_is_printed(chat_tokenizer):
    def say(role, text):
        return [{"role": role, "content": text}]

    row = {"chosen": say("assistant", "Yes."), "rejected": say("assistant", "Not sure.")}
    rows = Dataset.from_list([{"prompt": say("user", "Is the sky blue?"), **row}])
    (row,) = align.data.tokenize_pairs(rows, chat_tokenizer, max_length=200)
    assert f"```\n{align.data.describe_example(row, chat_tokenizer, 'pairs')}\n```" in DOCS
