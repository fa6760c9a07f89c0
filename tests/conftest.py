"""What every test needs: what it imports from its own folder is forgotten after it."""

import os
import sys
from pathlib import Path

import pytest

from tests.real_model.make import is_made, real_model_folder


@pytest.fixture(autouse=True)
def forget_modules_of_the_test(tmp_path):
    """A `my_rewards.py` of one test must not be the `my_rewards` that a later one imports."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None)
        if file and Path(file).is_relative_to(tmp_path):
            del sys.modules[name]


@pytest.fixture(scope="session")
def real_model() -> str:
    """The folder of SmolLM2-135M-Instruct in bfloat16: a chat model whose end and padding token is <|im_end|>."""
    folder = real_model_folder()
    if not is_made(folder):
        pytest.skip(f"{folder} is not there: python -m tests.real_model makes it (or set ALIGN_REAL_MODEL)")
    return str(folder)


@pytest.fixture
def real_pairs() -> Path:
    """2,000 published preference pairs; a clone does not have them, and then the test says what is missing."""
    root = Path(__file__).parents[1]
    path = (root / os.environ.get("ALIGN_SHARED_DATA", "../shared/data")).resolve() / "hh_harmless_pairs.parquet"
    if not path.exists():
        pytest.skip(f"{path} is missing (set ALIGN_SHARED_DATA to the folder that holds hh_harmless_pairs.parquet)")
    return path


def pytest_collection_modifyitems(items):
    for item in items:
        if "real_model" in item.fixturenames:
            item.add_marker("real_model")
