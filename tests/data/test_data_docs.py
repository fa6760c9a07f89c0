"""Every example of docs/data.md is data that its command takes."""

import re
from pathlib import Path

import pytest
from datasets import Dataset

import align.data
from align.errors import DataError

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


def test_the_printed_error_is_what_is_printed(chat_tokenizer):
    rows = Dataset.from_list([{"question": "q", "choosen": "a", "rejected": "b"}])
    with pytest.raises(DataError) as error:
        align.data.tokenize_pairs(rows, chat_tokenizer, max_length=64, source="pairs.csv")
    assert f"```\nalign: error: {error.value}\n```" in DOCS


@pytest.mark.parametrize("use", ["completions", "unpaired"])
def test_a_completion_that_repeats_the_prompt_is_bad(use, chat_tokenizer):
    row = {"prompt": "Question: Is it yes or no?", "completion": "Question: Is it yes or no? yes", "label": True}
    with pytest.raises(DataError, match="completion repeats the prompt"):
        getattr(align.data, f"tokenize_{use}")(Dataset.from_list([row]), chat_tokenizer, max_length=64)
