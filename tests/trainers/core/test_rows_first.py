"""Of a model that is named, the rows are read and checked before its weights: those of a large one take minutes."""

import json
import shutil
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import LlamaConfig

import align
from align.cli.main import main
from align.errors import DataError
from align.lazy import load
from align.methods import get_method
from tests.trainers.pairs.preference_runs import toy_pairs
from tests.trainers.tiny_runs import QUIET, demonstrations, prompts, wanted_words

METHODS = ["sft", "reward", "dpo", "kto", "listwise_dpo", "srpo", "sparsepo", "remax", "rloo", "ppo", "metaapo"]


@pytest.fixture
def weightless(policy, tmp_path) -> Path:
    """A model whose weights cannot be read."""
    folder = tmp_path / "weightless"
    shutil.copytree(policy, folder)
    (folder / "model.safetensors").write_bytes(b"none")
    return folder


def trainer_on(method: str, model, rows: Dataset, folder):
    known = get_method(method)
    given = {"per_device_train_batch_size": 4, "max_steps": 1, **QUIET}
    given |= {"max_completion_length": 8} if known.rewards else {"max_length": 32}
    options = {"reward": wanted_words} if known.rewards else {}
    return load(known.trainer)(str(model), args=load(known.config)(str(folder), **given), train_dataset=rows, **options)


def rows_of(method: str) -> Dataset:
    if method == "sft":
        return demonstrations(8)
    return prompts(8) if get_method(method).data == "prompts" and method != "metaapo" else toy_pairs(8)


@pytest.mark.parametrize("method", METHODS)
def test_a_bad_row_is_named_before_the_weights_are_read(method, weightless, tmp_path):
    rows = rows_of(method)
    with pytest.raises(align.errors.AlignError, match=r"weights|model\.safetensors|weightless"):
        trainer_on(method, weightless, rows, tmp_path / "run")
    empty = [{**row, "prompt": " "} if number == 5 else row for number, row in enumerate(rows)]
    with pytest.raises(DataError, match=r"prompt is empty: 1 \(row 5\)"):
        trainer_on(method, weightless, Dataset.from_list(empty), tmp_path / "run")


@pytest.mark.parametrize("method", ["sft", "reward", "dpo", "rloo"])
def test_what_the_config_says_of_rows_is_looked_at_before_the_weights(method, weightless, tmp_path):
    config = LlamaConfig.from_pretrained(weightless)
    config.vocab_size = 20  # the tokenizer has more
    config.save_pretrained(weightless)
    with pytest.raises(DataError, match="has embeddings for 20 tokens"):
        trainer_on(method, weightless, rows_of(method), tmp_path / "run")


def test_a_command_reads_the_rows_first(weightless, tmp_path, capsys):
    rows = [{**row, "chosen": ""} if number == 2 else row for number, row in enumerate(toy_pairs(8))]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for method in ("dpo", "reward"):
        arguments = ["--model_name_or_path", weightless, "--dataset_name", file, "--use_cpu", "--eval_strategy", "no"]
        assert main([method, *map(str, arguments), "--output_dir", str(tmp_path / "run"), "--max_length", "32"]) != 0
        assert "chosen is empty: 1 (row 2)" in capsys.readouterr().err
