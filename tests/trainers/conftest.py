import pytest
from tiny_runs import tiny_model

from align.data import toy


@pytest.fixture(scope="session")
def tokenizer():
    return toy.tokenizer()


@pytest.fixture(scope="session")
def policy(tokenizer, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("policy")
    tiny_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
