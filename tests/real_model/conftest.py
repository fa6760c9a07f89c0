"""Forty published preference pairs as chat messages (hh-rlhf, harmless; the mild and short ones)."""

from pathlib import Path

import pytest
from datasets import Dataset, disable_progress_bars, load_dataset

disable_progress_bars()
FILE = Path(__file__).parents[1] / "data" / "hh_chat_pairs.jsonl"


@pytest.fixture(scope="session")
def chat_pairs(tmp_path_factory) -> Dataset:
    return load_dataset("json", data_files=str(FILE), split="train", cache_dir=str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def real_tokenizer(real_model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(real_model)
