"""Names of the hub where it cannot be reached: one sentence in about a second, and the cache still serves."""

import json
import time

import datasets
import pytest
import requests
from huggingface_hub import constants

from align.cli.main import main
from align.data import hub, load_rows
from align.errors import ConfigError, DataError
from align.modeling.load import load_policy, load_tokenizer


@pytest.fixture
def asked(monkeypatch):
    """The hub does not answer; returns how often it was asked."""
    calls = []

    def head(address, timeout):
        calls.append(address)
        raise requests.ConnectionError("no route")

    monkeypatch.setattr(requests, "head", head)
    monkeypatch.setattr(hub, "_last", None)
    return calls


@pytest.mark.parametrize(
    ("load", "error"), [(load_policy, ConfigError), (load_tokenizer, ConfigError), (load_rows, DataError)]
)
def test_an_unknown_name_is_one_sentence_at_once(load, error, asked):
    with pytest.raises(error):
        load("somebody/another")  # imports what it needs
    start = time.monotonic()
    with pytest.raises(error) as found:
        load("somebody/nothing-of-this-name")
    assert time.monotonic() - start < 2
    sentence = str(found.value)
    assert "somebody/nothing-of-this-name" in sentence and "not in the cache of the hub" in sentence
    assert f"{constants.ENDPOINT} does not answer (no connection)" in sentence and "\n" not in sentence
    assert len(asked) == 1  # the answer is kept for a minute
    assert not constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE  # as before


def test_what_is_in_the_cache_is_loaded(asked, monkeypatch, tmp_path):
    snapshot = tmp_path / "models--somebody--kept" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 1}))
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    from transformers import AutoConfig

    from align.modeling.pretrained import from_pretrained

    assert from_pretrained(AutoConfig, "somebody/kept", "model", cache_dir=tmp_path).n_layer == 1


def test_local_paths_ask_nobody(asked, tmp_path):
    with pytest.raises(ConfigError):
        load_policy(tmp_path)
    assert not asked


def test_a_dry_run(asked, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    base = ["sft", "--dry-run", "--dataset_name", str(tmp_path / "rows.jsonl"), "--output_dir", str(tmp_path)]
    assert main([*base, "--model_name_or_path", "somebody/nothing", "--per_device_train_batch_size", "1"]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("align: error: cannot load the tokenizer 'somebody/nothing'") and "does not answer" in last
