import pytest
from datasets import Dataset

from align.data import BadRows, tokenize_completions, tokenize_pairs, tokenize_prompts
from align.errors import DataError

GOOD = {"prompt": "Human: hi", "chosen": " yes", "rejected": " no"}
LIMITS = {
    tokenize_prompts: {"max_prompt_length": 40},
    tokenize_completions: {"max_length": 60},
    tokenize_pairs: {"max_length": 60, "max_prompt_length": 40},
}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def reasons(tokenize, rows, tokenizer, **options):
    """{row: reason} for a list of rows, of which at least one is good."""
    report = BadRows()
    tokenize(Dataset.from_list(rows), tokenizer, max_bad_share=0.99, report=report, **(LIMITS[tokenize] | options))
    return {row: reason for reason, numbers in report.reasons.items() for row in numbers}


def test_every_bad_pair_is_named_with_its_reason(tokenizer):
    rows = [
        GOOD,
        {**GOOD, "prompt": None},
        {**GOOD, "prompt": " \n"},
        {**GOOD, "chosen": None},
        {**GOOD, "chosen": " "},
        {**GOOD, "rejected": ""},
        {**GOOD, "chosen": " no"},
        {**GOOD, "chosen": "no "},
        {**GOOD, "prompt": "x" * 50},
        {**GOOD, "prompt": "<bos><bos> hi"},
        {**GOOD, "chosen": "<eos>"},
    ]
    assert reasons(tokenize_pairs, rows, tokenizer) == {
        1: "prompt is missing",
        2: "prompt is empty",
        3: "chosen is missing",
        4: "chosen is empty",
        5: "rejected is empty",
        6: "chosen equals rejected",
        7: "chosen equals rejected",
        8: "prompt is longer than max_prompt_length=40 tokens",
        9: "prompt starts with BOS twice",
        10: "chosen is empty",
    }
    rows = [GOOD, {**GOOD, "prompt": "x" * 59}, {**GOOD, "chosen": "y" * 70 + "a", "rejected": "y" * 70 + "b"}]
    assert reasons(tokenize_pairs, rows, tokenizer, max_prompt_length=None) == {
        1: "prompt leaves no room for a completion within max_length=60 tokens",
        2: "chosen and rejected are the same tokens after the cut at max_length",
    }


def test_whole_dialogues_beside_their_prompt(tokenizer):
    long = "\n\nHuman: hello there\n\nAssistant:"
    rows = [GOOD, {"prompt": long, "chosen": f"{long} yes", "rejected": f"{long} no"}]
    found = reasons(tokenize_pairs, rows, tokenizer, max_prompt_length=None, max_length=200)
    assert found == {1: "chosen repeats the prompt (drop the column prompt, it is then taken from the pair)"}


def test_the_wrong_type_in_one_row(tokenizer, tmp_path):
    from align.data import load_rows

    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": 3}\n{"prompt": ["b"]}\n')
    report = BadRows()
    tokenize_prompts(load_rows(path), tokenizer, max_prompt_length=9, max_bad_share=0.9, report=report)
    assert report.reasons == {
        "prompt has the wrong type (int instead of text)": [1],
        "prompt has the wrong type (list instead of text)": [2],
    }


def test_bad_messages(chat_tokenizer):
    good = {"prompt": [user("hi")], "chosen": [assistant("yes")], "rejected": [assistant("no")]}
    rows = [
        good,
        {**good, "prompt": []},
        {**good, "prompt": [user("  ")]},
        {**good, "prompt": [{"role": "user"}]},
        {**good, "prompt": [{"content": "hi"}]},
        {**good, "prompt": [user("hi"), assistant("well")]},
        {**good, "chosen": [assistant(" ")]},
        {**good, "chosen": [user("me")]},
        {**good, "chosen": [user("hi"), assistant("yes")]},
        {**good, "rejected": [assistant("yes ")]},
        {**good, "chosen": None},
        {**good, "chosen": [{**assistant("yes"), "weight": 0}]},
        {**good, "chosen": [{**assistant("yes"), "weight": 1}]},
    ]
    found = reasons(tokenize_pairs, rows, chat_tokenizer)
    assert found.pop(11).startswith("chosen has a message of weight 0, which would be trained")
    assert found.pop(8).startswith("chosen repeats the prompt (drop the column prompt")
    assert found == {
        1: "prompt is empty",
        2: "prompt ends in an empty message",
        3: "prompt has a malformed message (no content)",
        4: "prompt has a malformed message (no role)",
        5: "prompt ends with an assistant message, so there is nothing to answer",
        6: "chosen is empty",
        7: "chosen does not start with an assistant message",
        9: "chosen equals rejected",
        10: "chosen is missing",
    }


def test_messages_that_are_no_messages(chat_tokenizer, tmp_path):
    from align.data import load_rows

    path = tmp_path / "rows.jsonl"
    lines = [
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
        '{"messages": "hello"}',
        '{"messages": ["hello"]}',
        '{"messages": [{"role": "user", "content": ["a"]}]}',
        '{"messages": [{"role": "user", "content": "a"}]}',
        '{"messages": [{"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}]}',
    ]
    path.write_text("\n".join(lines))
    report = BadRows()
    tokenize_completions(load_rows(path), chat_tokenizer, max_length=99, max_bad_share=0.9, report=report)
    assert report.reasons == {
        "messages has the wrong type (str instead of a list of messages)": [1],
        "messages has a malformed message (str instead of role and content)": [2],
        "messages has a malformed message (content is list instead of text)": [3],
        "messages has no assistant message": [4],
        "the chat template renders no tool_calls: use the tokenizer of a model that was trained with tools": [5],
    }


def test_tools_are_refused_where_a_row_has_them(tokenizer):
    rows = [{"prompt": "hi", "tools": None}, {"prompt": "hi", "tools": ["f"]}]
    assert reasons(tokenize_prompts, rows, tokenizer) == {
        1: "tools are not supported here, only in demonstrations and pairs that are trained on"
    }


def test_completions_that_would_train_nothing(tokenizer):
    rows = [
        {"prompt": "Human: hi", "completion": " yes"},
        {"prompt": "x" * 60, "completion": " yes"},
        {"prompt": "Human: hi", "completion": "\n"},
    ]
    assert reasons(tokenize_completions, rows, tokenizer) == {
        1: "prompt leaves no room for a completion within max_length=60 tokens",
        2: "completion is empty",
    }


def test_an_answer_behind_the_limit_trains_no_token(chat_tokenizer):
    rows = [{"messages": [user(text), assistant("yes")]} for text in ("hi", "x" * 60)]
    assert reasons(tokenize_completions, rows, chat_tokenizer) == {1: "no token is trained after the cut at max_length"}


def test_a_pair_without_a_shared_beginning(tokenizer):
    rows = [{"chosen": "sky blue", "rejected": "sky green"}, {"chosen": "yes", "rejected": "no"}]
    assert reasons(tokenize_pairs, rows, tokenizer) == {1: "chosen and rejected share no prompt"}


def test_the_share_decides_between_an_error_and_dropping(tokenizer, caplog):
    rows = [GOOD] * 18 + [{**GOOD, "chosen": ""}] * 2
    data = Dataset.from_list(rows)
    with pytest.raises(DataError) as error:
        tokenize_pairs(data, tokenizer, max_length=60, max_bad_share=0.099, source="pairs.jsonl")
    assert str(error.value) == (
        "pairs.jsonl: 2 of 20 rows cannot be used (rows count from 0): chosen is empty: 2 (rows 18, 19). "
        "max_bad_share=0.099 allows 1. Fix or remove these rows, or drop them with max_bad_share=0.1 or more."
    )
    kept = tokenize_pairs(data, tokenizer, max_length=60, max_bad_share=0.1, source="pairs.jsonl")
    assert kept["row"][:] == list(range(18))
    assert "pairs.jsonl: 18 of 20 rows can be used (rows count from 0)" in caplog.text
    assert "dropped: chosen is empty: 2 (rows 18, 19)" in caplog.text


def test_by_default_one_bad_row_is_an_error(tokenizer):
    with pytest.raises(DataError, match="max_bad_share=0 allows 0"):
        tokenize_prompts(Dataset.from_list([{"prompt": "a"}] * 999 + [{"prompt": ""}]), tokenizer, max_prompt_length=9)


def test_no_row_left_is_an_error_whatever_the_share(tokenizer):
    with pytest.raises(DataError, match="1 of 1 rows .* No row is left"):
        tokenize_prompts(Dataset.from_list([{"prompt": ""}]), tokenizer, max_prompt_length=9, max_bad_share=1.0)
    with pytest.raises(DataError, match="has no rows"):
        tokenize_prompts(Dataset.from_dict({"prompt": []}), tokenizer, max_prompt_length=9, max_bad_share=1.0)


def test_the_file_that_rows_were_loaded_from_is_named(tokenizer, tmp_path):
    from align.data import load_rows

    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": ""}\n')
    with pytest.raises(DataError, match="mine.jsonl: 1 of 1 rows"):
        tokenize_prompts(load_rows(path), tokenizer, max_prompt_length=9)


def test_many_rows_are_counted_and_the_first_named():
    report = BadRows("pairs.jsonl", total=100)
    for row in range(50, 60):
        report.add(row, "prompt is empty")
    report.add(3, "chosen is empty")
    report.note(1, "chosen is cut at max_length=8")
    assert report.counts == {"prompt is empty": 10, "chosen is empty": 1}
    assert report.bad == 11 and report.share == 0.11
    assert report.summary().splitlines() == [
        "pairs.jsonl: 89 of 100 rows can be used (rows count from 0)",
        "  dropped: prompt is empty: 10 (rows 50, 51, 52, 53, 54, ...)",
        "  dropped: chosen is empty: 1 (row 3)",
        "  kept:    chosen is cut at max_length=8: 1 (row 1)",
    ]


def test_text_that_only_looks_like_messages_is_text(tokenizer):
    """A template, an answer in JSON with a role of its own, and brackets without end."""
    texts = [
        '{{"role": "user", "content": "{x}"}}',
        '{"role": "CEO", "content": "x"}',
        '{"messages": [], "x": {"role": 1}}',
        "[" * 3000 + '"role": 1',
    ]
    rows = Dataset.from_list([{"prompt": "Human: hi", "completion": text} for text in texts])
    found = tokenize_completions(rows, tokenizer, max_length=None)
    assert len(found) == len(texts)
