"""Tables of scored completions: every kind of file, and every kind of bad row named by its number."""

import json

import pandas as pd
import pytest

from align.data import toy
from align.data.ending import written_text
from align.errors import DataError
from align.evaluation.score_table import read_score_table
from align.evaluation.scoring import drawn_batch
from align.rollout.types import Completion
from align.trainers.on_policy.rewards import RewardColumns
from align.trainers.on_policy.samples import make_samples


def frame(**changes):
    rows = {
        "prompt": ["sea", "sea", "hill", "sea", "hill"],
        "completion": ["a", "b", "a", "NA", "c"],
        "rm": [0.1, 0.2, 0.3, 0.4, 0.5],
        "gold": [1.0, 2.0, 3.0, 4.0, 5.0],
    }
    return pd.DataFrame({**rows, **changes})


def save(table, path):
    if path.suffix == ".parquet":
        table.to_parquet(path)
    elif path.suffix == ".csv":
        table.to_csv(path, index=False)
    else:
        table.to_json(path, orient="records", lines=path.suffix == ".jsonl")
    return path


def read(path, **options):
    return read_score_table(path, **{"proxies": ["rm"], "gold": "gold", **options})


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl", ".json"])
def test_scores_belong_to_their_row(tmp_path, suffix):
    table = read(save(frame(), tmp_path / f"scores{suffix}"))
    assert [rows.tolist() for rows in table.rows] == [[0, 1, 3], [2, 4]]
    assert [s.tolist() for s in table.by_prompt("rm")] == [[0.1, 0.2, 0.4], [0.3, 0.5]]
    assert [s.tolist() for s in table.by_prompt("gold")] == [[1, 2, 4], [3, 5]]
    assert table.completions[3] == "NA" and table.prompts[2] == "hill"


def test_prompt_id_comes_before_prompt(tmp_path):
    path = save(frame(prompt_id=[7, 7, 8, 8, 8], completion=list("abcde")), tmp_path / "t.parquet")
    assert [rows.tolist() for rows in read(path).rows] == [[0, 1], [2, 3, 4]]
    assert [rows.tolist() for rows in read(path, prompt="prompt").rows] == [[0, 1, 3], [2, 4]]


def test_conversations_are_prompts_too(tmp_path):
    chats = [[{"role": "user", "content": text}] for text in frame()["prompt"]]
    assert [rows.tolist() for rows in read(save(frame(prompt=chats), tmp_path / "t.parquet")).rows] == [
        [0, 1, 3],
        [2, 4],
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rm": [0.1, None, 0.3, float("nan"), 0.5]}, "column 'rm' is missing .* in rows 1, 3"),
        ({"gold": [1, 2, 3, 4, float("inf")]}, "column 'gold' is not a finite number in rows 4; the first is inf"),
        ({"gold": ["1", "2", "three", "4", "5"]}, "column 'gold' is not a finite number in rows 2; the first is three"),
        ({"prompt": ["sea", None, "hill", "sea", "hill"]}, "column 'prompt' is missing in rows 1"),
        ({"completion": ["a", "b", "a", "b", "c"]}, "same answer .* different scores 'rm' in rows 1, 3"),
        ({"completion_id": [0, 1, 0, 1, 1]}, "'completion_id' of the same prompt repeats an earlier row in rows 3"),
        ({"gold": [1.0] * 5}, "a gold score that never differs"),
    ],
)
def test_bad_rows_are_named(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        read(save(frame(**changes), tmp_path / "t.parquet"))


def test_many_bad_rows_are_counted(tmp_path):
    table = pd.concat([frame()] * 6, ignore_index=True)
    table["rm"] = None
    with pytest.raises(DataError, match="rows 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 20 more"):
        read(save(table, tmp_path / "t.parquet"))


def test_repeated_draws_stay_and_a_doubled_file_is_refused(tmp_path):
    drawn_twice = frame(completion=["a", "b", "a", "b", "c"], rm=[0.1, 0.2, 0.3, 0.2, 0.5], gold=[1, 2, 3, 2, 5])
    assert len(read(save(drawn_twice, tmp_path / "t.parquet")).rows[0]) == 3
    doubled = pd.concat([frame(), frame()], ignore_index=True)
    with pytest.raises(DataError, match="at least twice .first again in rows 5, 6, 7, 8, 9"):
        read(save(doubled, tmp_path / "d.parquet"))
    named = doubled.assign(completion_id=range(10))
    assert sum(len(rows) for rows in read(save(named, tmp_path / "n.parquet")).rows) == 10


def test_with_identifiers_equal_answers_are_different_draws(tmp_path):
    twice = frame(completion=["a", "a", "a", "a", "a"])
    with pytest.raises(DataError, match="the same answer to the same prompt has different scores"):
        read(save(twice, tmp_path / "t.csv"))
    table = read(save(twice.assign(completion_id=range(5)), tmp_path / "i.csv"))
    assert [len(rows) for rows in table.rows] == [3, 2]


def test_columns_and_files_that_are_not_there(tmp_path):
    path = save(frame(), tmp_path / "t.csv")
    with pytest.raises(DataError, match="no column 'reward' for the proxy .columns: prompt, completion, rm, gold"):
        read(path, proxies=["reward"])
    with pytest.raises(DataError, match="neither a prompt_id nor a prompt column"):
        read(save(frame().drop(columns="prompt"), tmp_path / "p.csv"))
    with pytest.raises(DataError, match="both a proxy and the gold score"):
        read(path, gold="rm")
    with pytest.raises(DataError, match="does not exist"):
        read(tmp_path / "nowhere.csv")
    with pytest.raises(DataError, match="unknown kind of table '.xlsx'"):
        (tmp_path / "t.xlsx").write_text("")
        read(tmp_path / "t.xlsx")
    (tmp_path / "torn.csv").write_text("prompt,rm,gold\na,1\n")
    with pytest.raises(DataError, match="cannot be read as .csv"):
        read(tmp_path / "torn.csv")
    (tmp_path / "torn.jsonl").write_text(json.dumps({"prompt": "a"}) + '\n{"prompt": ')
    with pytest.raises(DataError, match="torn.jsonl, line 2: not valid JSON: Expecting value .character 10 "):
        read(tmp_path / "torn.jsonl")


def test_rewards_see_what_is_drawn_as_they_see_it_in_training():
    """One rule for texts and their ends: a control token that a policy writes is no less there in best-of-n."""
    tokenizer = toy.tokenizer()
    words = tokenizer("also also", add_special_tokens=False)["input_ids"]
    ids = [words[0], tokenizer.unk_token_id, words[1], tokenizer.eos_token_id]
    drawn = [Completion(ids, [0.0] * 4, "stop"), Completion(ids[:3], [0.0] * 3, "length")]
    row = {"prompt": "say", "prompt_ids": [5, 6], "row": 3, "topic": "sea"}
    samples = make_samples(tokenizer, row, drawn, 0)
    batch = drawn_batch([(row, c, written_text(tokenizer, c.token_ids, c.finish_reason == "stop")) for c in drawn])
    trained = RewardColumns(lambda completions: [0.0] * len(completions), None).batch(samples)
    for name in ("prompts", "completions", "prompt_ids", "completion_ids", "columns", "rows", "ended"):
        assert getattr(batch, name) == getattr(trained, name), name
    assert batch.ended == [True, False] and tokenizer.unk_token in batch.completions[0]


def test_numbers_of_prompts_are_read_as_numbers(tmp_path, monkeypatch):
    """Not made into JSON one by one, which took most of the time of a table with a million rows."""
    path = tmp_path / "t.csv"
    path.write_text("prompt_id,completion_id,rm,gold\n" + "".join(f"{i // 3},{i % 3},{i},{i}\n" for i in range(12)))
    monkeypatch.setattr("json.dumps", None)
    table = read_score_table(path, proxies=["rm"], gold="gold")
    assert [rows.tolist() for rows in table.rows] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert table.prompts[3] == "1"


def test_row_labels_of_pandas_are_no_rows(tmp_path):
    table = frame(rm=[0.1, 0.2, float("inf"), 0.4, 0.5])
    table.index = [10, 20, 30, 40, 50]
    with pytest.raises(DataError, match="'rm' is not a finite number in rows 2; the first is inf"):
        read(save(table, tmp_path / "t.parquet"))
    labelled = frame().set_index("prompt")  # a column all the same
    assert [rows.tolist() for rows in read(save(labelled, tmp_path / "t.parquet")).rows] == [[0, 1, 3], [2, 4]]


def test_a_column_that_the_first_row_lacks_is_there(tmp_path):
    rows = frame(prompt_id=[None, 7, 8, 7, 8]).to_dict("records")
    del rows[0]["prompt_id"]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="'prompt_id' is missing in rows 0"):
        read(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.json", b'{"rm": 1}', "is a JSON dict, not a list of objects"),
        ("t.json", b'["a"]', "row 0 is 'a', not an object"),
        ("t.jsonl", b'{"rm": 1}\nnull\n', "t.jsonl, line 2: NoneType instead of an object"),
        ("t.jsonl", b'{"rm": 1}\n\n{"rm": 1, "go', "t.jsonl, line 3: not valid JSON"),
        ("t.jsonl", b'{"rm": 1}\n{"rm": "\xff"}\n', "t.jsonl, line 2: not UTF-8 text"),
        ("t.jsonl", b'{"rm": 1}\n{"rm": "x"}\n', "column 'rm' does not hold values of one kind"),
        ("t.jsonl", b'{"rm": 1' + b"0" * 30 + b"}\n", "column 'rm' does not hold values of one kind"),
        ("t.csv", b"prompt,rm,rm,gold\n1,2,3,4\n", "several columns named 'rm'"),
        ("t.csv", b"prompt,rm,gold\n\xe4,2,3\n\xe4,3,4\n", "'prompt' is not text in UTF-8"),
    ],
)
def test_files_that_are_no_table(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(path)


def test_times_are_no_scores(tmp_path):
    with pytest.raises(DataError, match="'gold' holds times, not scores"):
        read(save(frame(gold=pd.date_range("2020-01-01", periods=5)), tmp_path / "t.parquet"))
