import pytest
from datasets import Dataset, DatasetDict

from align.data import DataFormat, detect_format
from align.data.formats import format_for
from align.errors import DataError

USER, ANSWER, OTHER = (
    [{"role": role, "content": text}] for role, text in (("user", "q"), ("assistant", "a"), ("assistant", "b"))
)

FORMATS = [
    ({"prompt": "p"}, DataFormat("prompt_only", False)),
    ({"prompt": USER}, DataFormat("prompt_only", True)),
    ({"prompt": "p", "completion": "c"}, DataFormat("prompt_completion", False)),
    ({"prompt": USER, "completion": ANSWER}, DataFormat("prompt_completion", True)),
    ({"text": "t"}, DataFormat("language_modeling", False)),
    ({"messages": USER + ANSWER}, DataFormat("language_modeling", True)),
    ({"prompt": "p", "chosen": "c", "rejected": "r"}, DataFormat("preference", False)),
    ({"chosen": "p c", "rejected": "p r"}, DataFormat("preference", False, implicit_prompt=True)),
    ({"prompt": USER, "chosen": ANSWER, "rejected": OTHER}, DataFormat("preference", True)),
    ({"chosen": USER + ANSWER, "rejected": USER + OTHER}, DataFormat("preference", True, implicit_prompt=True)),
    # a copy of the first message in plain text, as in ultrafeedback_binarized
    ({"prompt": "q", "chosen": USER + ANSWER, "rejected": USER + OTHER}, DataFormat("preference", True, True)),
]


@pytest.mark.parametrize(
    "row, expected", FORMATS, ids=[f"{'-'.join(row)}-{fmt.conversational}" for row, fmt in FORMATS]
)
def test_every_format_is_detected_and_other_columns_do_not_matter(row, expected):
    assert detect_format(Dataset.from_list([row])) == expected
    assert detect_format(Dataset.from_list([{**row, "margin": 1.0, "source": "x"}])) == expected


def test_the_first_row_may_be_missing():
    rows = [{"prompt": None}, {"prompt": USER}]
    assert detect_format(Dataset.from_list(rows)).conversational


def test_a_preference_set_serves_every_use():
    pairs = Dataset.from_list([{"prompt": "p", "chosen": "c", "rejected": "r"}])
    assert {format_for(pairs, use).kind for use in ("prompts", "completions", "pairs")} == {"preference"}


def test_a_prompt_column_beside_messages_serves_as_prompts():
    rows = Dataset.from_list([{"prompt": "p", "messages": USER + ANSWER}])
    assert format_for(rows, "prompts") == DataFormat("prompt_only", False)
    assert format_for(rows, "completions") == DataFormat("language_modeling", True)


def test_unknown_columns_are_listed_with_the_nearest():
    rows = Dataset.from_list([{"instruction": "p", "choosen": "c", "rejectd": "r"}])
    with pytest.raises(DataError) as error:
        format_for(rows, "pairs", "pairs.csv")
    message = str(error.value)
    assert message.startswith("pairs.csv has no preference pairs: expected the columns 'chosen' and 'rejected'")
    assert "found 'choosen', 'instruction', 'rejectd'" in message
    assert "'choosen' -> 'chosen'" in message and "'rejectd' -> 'rejected'" in message
    assert "'instruction' -> 'prompt'" in message
    for column in ("completions", "scores"):  # one of two is not another one misspelt
        with pytest.raises(DataError) as error:
            format_for(Dataset.from_list([{"prompt": "p", column: [1.0, 2.0]}]), "pairs")
        message = str(error.value)
        assert "'completions', several answers to each prompt, need 'scores'" in message and "Rename" not in message


def test_prompts_alone_are_no_completions():
    with pytest.raises(DataError, match="no completions to train on"):
        format_for(Dataset.from_list([{"prompt": "p"}]), "completions")


def test_text_and_messages_must_not_be_mixed():
    with pytest.raises(DataError, match="'completion' holds text, 'prompt' holds messages"):
        detect_format(Dataset.from_list([{"prompt": USER, "completion": "c"}]))


def test_a_column_of_numbers_is_refused():
    with pytest.raises(DataError, match="row 0: column 'prompt' holds int"):
        detect_format(Dataset.from_list([{"prompt": 3}]), "numbers.jsonl")


def test_splits_and_other_objects_are_refused():
    rows = Dataset.from_list([{"prompt": "p"}])
    with pytest.raises(DataError, match="choose one of: train, test"):
        detect_format(DatasetDict(train=rows, test=rows))
    with pytest.raises(DataError, match="got list"):
        detect_format([{"prompt": "p"}])
