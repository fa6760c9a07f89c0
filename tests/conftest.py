"""What every test needs: what it imports from its own folder is forgotten after it."""

import sys
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def forget_modules_of_the_test(tmp_path):
    """A `my_rewards.py` of one test must not be the `my_rewards` that a later one imports."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None)
        if file and Path(file).is_relative_to(tmp_path):
            del sys.modules[name]
