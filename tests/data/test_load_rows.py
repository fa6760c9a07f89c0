import json

import datasets
import huggingface_hub.constants
import pandas as pd
import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from align.data import csv_cells, load_rows
from align.data.rows import source_of
from align.errors import DataError

ROWS = [{"prompt": "one", "completion": "1"}, {"prompt": "two", "completion": "None"}]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".json", ".csv"])
def test_a_file_of_each_type(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    frame = pd.DataFrame(ROWS)
    if suffix == ".parquet":
        frame.to_parquet(path)
    elif suffix == ".csv":
        frame.to_csv(path, index=False)
    elif suffix == ".json":
        path.write_text(json.dumps(ROWS))
    else:
        write_jsonl(path, ROWS)
    # The texts "1" and "None" stay texts, in CSV too.
    assert load_rows(str(path)).to_list() == ROWS
    first = load_rows(path, "train[:1]")
    assert first.to_list() == ROWS[:1]
    assert source_of(first) == f"{path} (train[:1])"  # rows are numbered within the slice


def test_a_changed_file_is_read_again(tmp_path):
    path = tmp_path / "rows.jsonl"
    for text in ("one", "two"):
        write_jsonl(path, [{"prompt": text}])
        assert load_rows(path).to_list() == [{"prompt": text}]


def test_cells_of_csv_stay_what_they_are_after_the_first_rows(tmp_path, monkeypatch):
    """The types were those of the first 10,000 rows: later texts were rewritten to fit, and numbers refused."""
    monkeypatch.setattr(csv_cells, "AT_ONCE", 10)
    path = tmp_path / "rows.csv"
    first = ["yes,1,1,True,01"] * 10_000
    path.write_text(
        "\n".join(["answer,whole,number,truth,code", *first, "007,2,1.5,False,02", "1e3,,,,", "True,3,2,,"])
    )
    rows = load_rows(path)[-3:]
    assert rows["answer"] == ["007", "1e3", "True"] and rows["code"] == ["02", None, None]
    assert (rows["whole"], rows["number"], rows["truth"]) == ([2, None, 3], [1.5, None, 2.0], [False, None, None])


def test_csv_numbers_and_line_breaks(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('prompt,completion,margin\n"a\nb",NA,1.5\nc,,\n')
    assert load_rows(path).to_list() == [
        {"prompt": "a\nb", "completion": "NA", "margin": 1.5},
        {"prompt": "c", "completion": None, "margin": None},
    ]


def test_a_folder_with_splits_in_the_file_names(tmp_path):
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "train-00000.jsonl", ROWS)
    write_jsonl(tmp_path / "data" / "train-00001.jsonl", ROWS)
    write_jsonl(tmp_path / "data" / "test.jsonl", ROWS[:1])
    write_jsonl(tmp_path / ".hidden.jsonl", ROWS)
    assert len(load_rows(tmp_path)) == 4
    assert len(load_rows(tmp_path, "test")) == 1
    with pytest.raises(DataError, match="no split 'validation'; it has: test, train"):
        load_rows(tmp_path, "validation")


def test_a_copy_of_a_hub_dataset_has_the_splits_that_the_hub_has(tmp_path):
    """UltraFeedback's: train_sft, train_prefs and train_gen were one split, with every row three times."""
    names = ("train_sft-00000-of-00001", "train_prefs-00000-of-00002", "train_prefs-00001-of-00002-0a1b")
    for name in (*names, "valid-00000-of-00001"):
        write_jsonl(tmp_path / f"{name}.jsonl", ROWS)
    assert (len(load_rows(tmp_path, "train_sft")), len(load_rows(tmp_path, "train_prefs"))) == (2, 4)
    assert len(load_rows(tmp_path, "validation")) == 2
    with pytest.raises(DataError, match="no split 'train'; it has: train_prefs, train_sft, validation"):
        load_rows(tmp_path)


def test_a_folder_without_splits_is_train(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    write_jsonl(tmp_path / "b.jsonl", ROWS)
    assert len(load_rows(tmp_path)) == 4
    with pytest.raises(DataError, match="it has: train"):
        load_rows(tmp_path, "test")


def test_files_left_out_of_a_folder_are_said(tmp_path, caplog):
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    write_jsonl(tmp_path / "notes.jsonl", ROWS)
    assert len(load_rows(tmp_path)) == 2
    assert "notes.jsonl not read" in caplog.text


def test_a_folder_of_two_file_types_is_refused(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    pd.DataFrame(ROWS).to_csv(tmp_path / "b.csv")
    with pytest.raises(DataError, match="mixes file types"):
        load_rows(tmp_path)


def test_a_single_file_does_not_pass_for_its_own_test_split(tmp_path):
    write_jsonl(tmp_path / "pairs.jsonl", ROWS)
    with pytest.raises(DataError, match="no split 'test'; it has: train"):
        load_rows(tmp_path / "pairs.jsonl", "test")
    write_jsonl(tmp_path / "test.jsonl", ROWS)
    assert len(load_rows(tmp_path / "test.jsonl", "test")) == len(load_rows(tmp_path / "test.jsonl")) == 2


def test_saved_datasets(tmp_path):
    rows = Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / "one")
    DatasetDict(train=rows, test=rows.select([0])).save_to_disk(tmp_path / "two")
    assert load_rows(tmp_path / "one").to_list() == ROWS
    assert load_rows(tmp_path / "two", "test").to_list() == ROWS[:1]
    with pytest.raises(DataError, match="no split 'dev'; it has: train, test"):
        load_rows(tmp_path / "two", "dev")
    with pytest.raises(DataError, match="there is no split 'test'"):
        load_rows(tmp_path / "one", "test")


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"prompt": "x"', r"rows.jsonl, line 4: not valid JSON: Expecting ',' delimiter \(character 14 "),
        (b'["x"]', r"rows.jsonl, line 4: list instead of an object"),
        (b'{"prompt": "\xff"}', r"rows.jsonl, line 4: not UTF-8 text \(byte 12 of the line"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n\n{"prompt": "b"}\n' + line + b'\n{"prompt": "c"}\n')
    with pytest.raises(DataError, match=message):
        load_rows(path)


def test_other_unreadable_files(tmp_path):
    (tmp_path / "broken.json").write_text('[{"prompt": "a"},\n {"prompt" "b"}]')
    with pytest.raises(DataError, match="broken.json, line 2: not valid JSON"):
        load_rows(tmp_path / "broken.json")
    (tmp_path / "broken.parquet").write_text("not parquet")
    (tmp_path / "export.csv").write_text("prompt;chosen;rejected\na;b;c\na;b, c;d, e, f\n", encoding="utf-8-sig")
    with pytest.raises(DataError, match="export.csv is separated by semicolons, and a .csv file here by commas"):
        load_rows(tmp_path / "export.csv")
    with pytest.raises(DataError, match="broken.parquet cannot be read as .parquet"):
        load_rows(tmp_path / "broken.parquet")
    (tmp_path / "wider.csv").write_text("prompt,chosen,rejected\nHello, you,b,c\n")  # chosen would be rejected
    for streaming in (False, True):
        with pytest.raises(
            DataError, match="wider.csv cannot be read as .csv: the rows have more cells than the header"
        ):
            load_rows(tmp_path / "wider.csv", streaming=streaming)
    (tmp_path / "broken.csv").write_text("a,b\n1,2\n1,2,3\n")
    with pytest.raises(DataError, match="Expected 2 fields in line 3"):
        load_rows(tmp_path / "broken.csv")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match="empty.jsonl is empty"):
        load_rows(tmp_path / "empty.jsonl")
    (tmp_path / "rows.txt").write_text("a")
    with pytest.raises(DataError, match="suffix '.txt'; readable are .parquet"):
        load_rows(tmp_path / "rows.txt")


def test_a_missing_file_never_asks_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "pairs.jsonl", ROWS)
    with pytest.raises(DataError, match=r"no file or folder 'pair.jsonl'. The folder .* has 'pairs.jsonl'"):
        load_rows("pair.jsonl")
    for name in ("./pairs", "../x/y", "a/b/c", "/nowhere/at/all", "data/x.csv"):
        with pytest.raises(DataError, match="there is no file or folder"):
            load_rows(name)


def test_a_hub_name_that_cannot_be_reached(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        DataError,
        match="'owner/pairs': there is no folder .* here, it is not in the cache of the hub, and HF_HUB_OFFLINE is set",
    ):
        load_rows("owner/pairs")


def test_a_configuration_belongs_to_the_hub(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(DataError, match="config 'main' has no meaning"):
        load_rows(tmp_path / "rows.jsonl", config="main")


def test_streams(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    for path in (tmp_path / "rows.jsonl", tmp_path / "saved"):
        rows = load_rows(path, streaming=True)
        assert isinstance(rows, IterableDataset) and list(rows) == ROWS
    with pytest.raises(DataError, match="is a slice, which a stream has none of"):
        load_rows(tmp_path / "rows.jsonl", "train[:1]", streaming=True)
