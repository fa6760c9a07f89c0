"""Answers with scores instead of choices: the best and the worst of them are the pair."""

import pytest
from datasets import Dataset

import align.data
from align.data.formats import detect_format
from align.errors import DataError
from align.evaluation.pairs import read_pairs

ROW = {"prompt": "is it", "completions": [" no", " yes", " so"], "scores": [0.5, 2.0, 1.0]}
MADE = {"chosen": " yes", "rejected": " no", "chosen_score": 2.0, "rejected_score": 0.5}


def test_best_and_worst_are_the_pair_everywhere(tokenizer):
    rows = Dataset.from_list([ROW])
    options = {"max_length": 50}
    (pair,) = align.data.tokenize_pairs(rows, tokenizer, **options)
    (written,) = align.data.tokenize_pairs(Dataset.from_list([{"prompt": "is it", **MADE}]), tokenizer, **options)
    assert {**written, **ROW} == pair  # with the columns of the row
    (streamed,) = align.data.tokenize_pairs(rows.to_iterable_dataset(), tokenizer, **options)
    assert streamed == pair
    trained = align.data.tokenize_completions(rows, tokenizer, **options)[0]
    assert trained["input_ids"] == pair["prompt_ids"] + pair["chosen_ids"]
    labelled = align.data.tokenize_unpaired(rows, tokenizer, **options)
    assert [(row["completion_ids"], row["label"]) for row in labelled] == [
        (pair["chosen_ids"], True),
        (pair["rejected_ids"], False),
    ]
    assert align.data.tokenize_prompts(rows, tokenizer, max_prompt_length=50)[0]["prompt_ids"] == pair["prompt_ids"]
    read, report = read_pairs(rows)
    assert (read.chosen, read.rejected, report.bad) == ([" yes"], [" no"], 0)


def test_messages_and_equal_scores(chat_tokenizer):
    def say(role, text):
        return [{"role": role, "content": text}]

    answers = [say("assistant", text) for text in ("no", "yes", "so", "well")]
    row = {"prompt": say("user", "is it"), "completions": answers, "scores": [3, 1, 3, 1]}
    rows = Dataset.from_list([row])
    assert detect_format(rows).conversational and detect_format(rows).scored
    (pair,) = align.data.tokenize_pairs(rows, chat_tokenizer, max_length=50)
    assert (pair["chosen"], pair["rejected"]) == (answers[0], answers[1])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"scores": [1.0, 1.0, 1.0]}, "scores are all the same"),
        ({"scores": [1.0, 2.0]}, "completions and scores differ in number"),
        ({"scores": [1.0, float("nan"), 2.0]}, "scores has something else than finite numbers"),
        ({"scores": [1.0, None, 2.0]}, "scores has something else than finite numbers"),
        ({"scores": None}, "scores is missing"),
        ({"completions": [" no"], "scores": [1.0]}, "completions has fewer than two answers"),
        ({"completions": [" no", " ", " so"], "scores": [1.0, 2.0, 1.5]}, "chosen is empty"),
    ],
)
def test_bad_rows_are_named(change, reason, tokenizer):
    with pytest.raises(DataError) as error:
        align.data.tokenize_pairs(Dataset.from_list([ROW, {**ROW, **change}]), tokenizer, max_length=50)
    assert "1 of 2 rows cannot be used" in str(error.value) and reason in str(error.value)
    assert "(row 1)" in str(error.value)


def test_messages_beside_text_are_refused():
    row = {**ROW, "prompt": [{"role": "user", "content": "is it"}]}
    with pytest.raises(DataError, match="'prompt' holds messages, 'completions' holds text"):
        detect_format(Dataset.from_list([row]))
