"""Files of JSON lines larger than the part that `datasets` takes the types from."""

import json

import pytest

from align.data import json_lines, load_rows
from align.errors import DataError

ROW = {
    "prompt": [{"role": "user", "content": "Is it late?"}],
    "answer": "Yes, rather late. " * 20,
    "id": "a",
    "x": None,
}
COUNT = 30_000  # 14 MiB


def written(tmp_path, *last, suffix=".jsonl", rows=COUNT):
    """Rows that are alike, and then these lines."""
    path = tmp_path / f"rows{suffix}"
    line = json.dumps(ROW).encode() + b"\n"
    path.write_bytes(
        line * rows + b"".join(one if isinstance(one, bytes) else json.dumps(one).encode() for one in last)
    )
    return path


TALK = {"role": "user", "content": 5}
FAULTS = [
    ({**ROW, "id": 5}, "'id' is a whole number, and text in the lines before"),
    ({**ROW, "answer": ["Yes"]}, "'answer' is a list, and text in the lines before"),
    ({**ROW, "prompt": [TALK]}, r"'prompt\[\].content' is a whole number, and text in the lines before"),
    (
        {**ROW, "prompt": [{**ROW["prompt"][0], "weight": 1}]},
        r"'prompt\[\].weight' is a whole number, and the lines",
    ),
    ({**ROW, "extra": "b"}, "'extra' is text, and the lines before have no 'extra'"),
    ({**ROW, "x": 1.5}, "'x' is a number, and null in the lines before"),
    (b'{"prompt": [], "answer": "Ye', "not valid JSON: Unterminated string"),
    (b'{"prompt": [], "answer": "Y\xff"}', "not UTF-8 text .byte 27 of the line"),
    (b'["prompt"]', "list instead of an object"),
]


@pytest.mark.parametrize(("line", "reason"), FAULTS)
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_a_late_line_at_fault_is_named_before_datasets_reads(line, reason, suffix, tmp_path, monkeypatch):
    """`datasets` would read the whole file into memory for a broken one; of one with another type it would make JSON
    of the same column in the lines around it: '"a"' of 'a'."""
    monkeypatch.setattr(json_lines, "TYPED", 1 << 16)
    file = written(tmp_path, line, b"\n", ROW, suffix=suffix, rows=500)
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: pytest.fail("read"))
    with pytest.raises(DataError, match=rf"rows{suffix}, line 501: {reason}"):
        load_rows(file)


def test_lines_that_differ_as_they_may(tmp_path):
    """Columns that are missing or null, blank lines, and at the beginning other types, which are kept as they are."""
    rows = load_rows(written(tmp_path, b"\n", {**ROW, "id": None}, b"\n{}\n", {"answer": "No."}))
    assert len(rows) == COUNT + 3 and rows[-1]["answer"] == "No." and rows[COUNT - 1]["id"] == "a"
    mixed = written(tmp_path, {**ROW, "id": 5}, b"\n", rows=10)
    assert load_rows(mixed)["id"] == ["a"] * 10 + [5]


def test_a_file_that_has_been_read_is_not_checked_again(tmp_path, monkeypatch):
    file = written(tmp_path, ROW)
    load_rows(file)
    monkeypatch.setattr(json_lines, "faulty_line", lambda files: pytest.fail("checked again"))
    assert len(load_rows(file)) == COUNT + 1


def test_a_stream_ends_at_a_late_line_of_another_type(tmp_path):
    from align.data import tokenize_prompts, toy

    rows = load_rows(written(tmp_path, {**ROW, "id": 5}, b"\n"), streaming=True)
    read = tokenize_prompts(
        rows.select_columns(["id"]).rename_column("id", "prompt"), toy.tokenizer(), max_prompt_length=9, streams=True
    )
    with pytest.raises(
        DataError, match=r"rows.jsonl, after row \d+: cannot be read: .*id\) changed from string to number"
    ):
        assert all(row["prompt"] == "a" for row in read)
