"""Everything here runs on the GPU if there is one, and in a small form on the CPU if there is none."""

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker("device")


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def policy(tmp_path_factory) -> str:
    """A folder: a Llama of two layers, on a GPU with sizes that its kernels like."""
    from align.data import toy
    from tests.trainers.tiny_runs import tiny_model

    tokenizer, folder = toy.tokenizer(), tmp_path_factory.mktemp("policy")
    large = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "max_position_embeddings": 256}
    tiny_model(tokenizer, **(large if torch.cuda.is_available() else {})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
