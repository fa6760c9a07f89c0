"""Pairs that are tokenised already get the limits of text."""

import warnings

import pytest
from datasets import Dataset

from align.data import BadRows, tokenize_pairs
from align.data.tokenized import limited_pairs
from align.errors import DataError
from align.trainers.pairs.data import IDS, numbered_pairs

ROWS = [
    {"prompt": "Question: yes or no? ", "chosen": "yes yes yes no blue", "rejected": "no", "margin": 1.0},
    {"prompt": "sky ", "chosen": "blue", "rejected": "green sun sky blue and yes no no", "margin": 2.0},
    {"prompt": "sky ", "chosen": "green sun sky blue yes", "rejected": "green sun sky blue no", "margin": 3.0},
]


@pytest.fixture
def tokenizer(make_tokenizer):
    return make_tokenizer(bos=True)


@pytest.mark.parametrize("limit", [None, 40, 18, 14])
def test_ids_are_cut_as_their_text_is(tokenizer, limit):
    rows = Dataset.from_list(ROWS)
    of_text, of_ids = BadRows(), BadRows()
    options = {"max_length": limit, "max_bad_share": 0.9}
    expected = tokenize_pairs(rows, tokenizer, report=of_text, **options)
    uncut = tokenize_pairs(rows, tokenizer, max_length=None)
    found = limited_pairs(uncut, tokenizer, report=of_ids, **options)
    assert (
        found.select_columns([*IDS, "row", "margin"]).to_list()
        == expected.select_columns([*IDS, "row", "margin"]).to_list()
    )
    cuts = {text: numbers for text, numbers in of_text.notes.items() if "max_length" in text}
    assert of_ids.reasons == of_text.reasons and of_ids.notes == cuts
    assert bool(cuts) == (limit in (14, 18)) and bool(of_ids.reasons) == (limit == 14)
    through_the_door = numbered_pairs(uncut, tokenizer, **options)
    assert through_the_door.select_columns(IDS).to_list() == expected.select_columns(IDS).to_list()
    streamed = numbered_pairs(uncut.to_iterable_dataset(), tokenizer, streams=True, **options)
    assert [{name: row[name] for name in IDS} for row in streamed] == expected.select_columns(IDS).to_list()


@pytest.mark.parametrize("names", [("chosen_ids", "rejected_ids"), ("chosen_input_ids", "rejected_input_ids")])
def test_whole_sequences_are_split_where_they_part(tokenizer, names):
    rows = Dataset.from_list(
        [{names[0]: [1, 5, 6, 7, 2], names[1]: [1, 5, 8, 2]}, {names[0]: [1, 3], names[1]: [1, 3, 4]}]
    )
    with warnings.catch_warnings(record=True) as told:
        found = numbered_pairs(rows, tokenizer, max_length=4, max_bad_share=0, scored=True)
    assert [w.category for w in told] == ([FutureWarning] if "chosen_input_ids" in names else [])
    assert found.select_columns(IDS).to_list() == [
        {"prompt_ids": [1, 5], "chosen_ids": [6, 7], "rejected_ids": [8, 2]},
        {"prompt_ids": [1], "chosen_ids": [3], "rejected_ids": [3, 4]},
    ]
    with pytest.raises(DataError, match="expected the columns"):
        numbered_pairs(rows, tokenizer, max_length=4, max_bad_share=0)


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"chosen_ids": [1, 2], "rejected_ids": [3, 4]}, "begin with no common token, so there is no prompt"),
        ({"chosen_ids": [1, 2], "rejected_ids": []}, "rejected_ids is empty"),
        ({"chosen_ids": [1, 2], "rejected_ids": None}, "rejected_ids is missing"),
        ({"chosen_ids": [1, 2], "rejected_ids": [1, 2]}, "are the same tokens"),
    ],
)
def test_bad_rows_of_ids(tokenizer, row, reason):
    rows = Dataset.from_list([{"chosen_ids": [1, 2], "rejected_ids": [1, 3]}, row])
    with pytest.raises(DataError, match=rf"{reason}: 1 \(row 1\)"):
        limited_pairs(rows, tokenizer, max_length=8)
