"""Folders as `hf download` leaves them: which of their files are which rows."""

import gzip
import json

import pytest
from datasets import Dataset

from align.data import load_rows
from align.data.json_lines import check_lines
from align.errors import DataError


def write(path, *texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        Dataset.from_list([{"prompt": text} for text in texts]).to_parquet(str(path))
        return
    lines = "".join(json.dumps({"prompt": text}) + "\n" for text in texts)
    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as file:
        file.write(lines)


def card(folder, *configs):
    (folder / "README.md").write_text("---\nlicense: mit\nconfigs:\n" + "".join(configs) + "---\n# A set\n")


CONFIG = (
    "- config_name: {0}\n  data_files:\n  - split: train\n    path: {0}/train-*\n"
    "  - split: test\n    path: {0}/test-*\n"
)


def texts(*args, **options):
    return [row["prompt"] for row in load_rows(*args, **options)]


def test_configurations_of_a_copy_are_not_mixed(tmp_path):
    """gsm8k's main and socratic, the same questions with other answers, were one set."""
    for config in ("main", "socratic"):
        for split in ("train", "test"):
            write(tmp_path / config / f"{split}-00000-of-00001.parquet", f"{config} {split}")
    with pytest.raises(DataError, match="would be of several sets, in main, socratic: name one"):
        load_rows(tmp_path)
    assert texts(tmp_path / "main") == ["main train"]
    card(tmp_path, CONFIG.format("main"), CONFIG.format("socratic"), CONFIG.format("not_downloaded"))
    with pytest.raises(
        DataError, match="several configurations, choose one with dataset_config, or name its folder: main"
    ):
        load_rows(tmp_path)
    with pytest.raises(DataError, match=r"no configuration 'x'; its README\.md names main, socratic"):
        load_rows(tmp_path, config="x")
    assert texts(tmp_path, "test", "socratic") == ["socratic test"]
    assert texts(tmp_path, "train", "main", streaming=True) == ["main train"]
    card(tmp_path, CONFIG.format("main"), CONFIG.format("socratic") + "  default: true\n")
    assert texts(tmp_path) == ["socratic train"]


@pytest.mark.parametrize(
    "entry",
    [
        "- config_name: default\n  data_files: a/*.jsonl\n",
        "- config_name: default\n  data_files:\n  - a/*.jsonl\n",
        "- config_name: default\n  data_files:\n  - split: train\n    path:\n    - a/one.jsonl\n    - ./a/two.jsonl\n",
        "- config_name: default\n  data_files: {train: 'a/*.jsonl'}\n",
        "- config_name: default\n  data_dir: a\n",
        "- config_name: default\n  data_files: a/**\n",
        "- config_name: other\n  data_files: ['https://x.org/a', '']\n- config_name: default\n  data_files: a/*\n",
    ],
)
def test_what_a_card_may_say(tmp_path, entry):
    for name in ("a/one.jsonl", "a/two.jsonl", "b/train.jsonl"):
        write(tmp_path / name, name)
    card(tmp_path, entry)
    assert texts(tmp_path) == ["a/one.jsonl", "a/two.jsonl"]


@pytest.mark.parametrize(
    "text", ["# Mine\n", "---\nlicense: mit\n---\n", "---\nconfigs: [\n---\n", "---\nconfigs: 3\n---\n"]
)
def test_a_readme_that_is_no_card(tmp_path, text):
    write(tmp_path / "train.jsonl", "one")
    (tmp_path / "README.md").write_text(text)
    assert texts(tmp_path) == ["one"]


def test_splits_of_other_names_are_not_mixed(tmp_path):
    """RewardBench's raw and filtered rows were one set."""
    for name in ("raw", "filtered"):
        write(tmp_path / "data" / f"{name}-00000-of-00001.parquet", name)
    assert texts(tmp_path, "filtered") == ["filtered"]
    with pytest.raises(DataError, match="no split 'train'; it has: filtered, raw"):
        load_rows(tmp_path)


def test_conversions_of_the_hub(tmp_path):
    """The branch refs/convert/parquet: configuration/split/0000.parquet."""
    for config in ("comparisons", "axis"):
        write(tmp_path / config / "validation" / "0000.parquet", config)
    with pytest.raises(DataError, match="several sets, in axis/validation, comparisons/validation"):
        load_rows(tmp_path, "validation")
    assert texts(tmp_path / "axis", "validation") == ["axis"]
    for month in ("01", "02"):  # parts of one set
        write(tmp_path / "parts" / month / "0000.parquet", month)
    assert texts(tmp_path / "parts") == ["01", "02"]


def test_compressed_lines(tmp_path):
    """hh-rlhf and HelpSteer."""
    for folder in ("harmless-base", "helpful-base"):
        for split in ("train", "test"):
            write(tmp_path / folder / f"{split}.jsonl.gz", f"{folder} {split}")
    assert texts(tmp_path, "test") == ["harmless-base test", "helpful-base test"]
    assert texts(tmp_path / "helpful-base" / "train.jsonl.gz") == ["helpful-base train"]
    assert texts(tmp_path / "helpful-base", "train", streaming=True) == ["helpful-base train"]
    with gzip.open(tmp_path / "broken.jsonl.gz", "wt") as file:
        file.write('{"prompt": "a"}\n{"prompt": "b"\n')
    with pytest.raises(DataError, match=r"broken\.jsonl\.gz, line 2: not valid JSON"):
        check_lines([tmp_path / "broken.jsonl.gz"])
    (tmp_path / "cut.jsonl.gz").write_bytes((tmp_path / "broken.jsonl.gz").read_bytes()[:20])
    with pytest.raises(DataError, match=r"cut\.jsonl\.gz: cut off or damaged"):
        load_rows(tmp_path / "cut.jsonl.gz")
    with pytest.raises(DataError, match="there is no file or folder"):
        load_rows("missing.jsonl.gz")


def test_descriptions_of_a_set_are_no_rows(tmp_path):
    write(tmp_path / "part.jsonl", "one")
    (tmp_path / "dataset_infos.json").write_text('{"default": {"splits": {}}}')
    assert texts(tmp_path) == ["one"]
