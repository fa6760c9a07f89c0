"""What every test needs: what it imports from its own folder is forgotten after it."""

import os
import sys
from pathlib import Path

import pytest

from align.quickstart.real.model import is_made
from tests.garbage import freeze, unfreeze
from tests.real_model.make import real_model_folder

ROOT = Path(__file__).parents[1]
LONGEST = tuple(
    f"tests/{name}.py"
    for name in (
        *("real_model/test_training", "trainers/core/test_matrix", "quickstart/test_quickstart"),
        *("benchmarks/test_faults", "rollout/test_server", "rollout/test_reproducibility", "trainers/core/test_fsdp2"),
        *("trainers/weighting/test_constrained", "trainers/on_policy/test_two_processes", "trainers/test_modpo_docs"),
        *("trainers/weighting/test_constrained_ranks", "benchmarks/test_gpu_check", "test_packaging"),
        *("trainers/on_policy/test_unbiasedness", "cli/test_doctor_check", "trainers/core/test_checkpoints"),
    )
)
"""Files that take a minute or more, in the order in which they begin: none of them is what the others wait for at the
end. (With `--no-loadscope-reorder`, or xdist begins with the files of most tests.)"""


@pytest.fixture(autouse=True)
def forget_modules_of_the_test(tmp_path):
    """A `my_rewards.py` of one test must not be the `my_rewards` that a later one imports."""
    before = set(sys.modules)
    yield
    new = set(sys.modules) - before
    for name in new:
        file = getattr(sys.modules[name], "__file__", None)
        if file and Path(file).is_relative_to(tmp_path):
            del sys.modules[name]
    if len(new) > 200:  # vLLM, say: the other tests of the file would look through it
        freeze()


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


def pytest_collection_finish():
    freeze()


@pytest.fixture(autouse=True, scope="module")
def freeze_what_stays():
    yield
    freeze()


def pytest_unconfigure():
    unfreeze()


def pytest_collection_modifyitems(items):
    assert all((ROOT / name).exists() for name in LONGEST), "a file of LONGEST is gone"
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.nodeid.partition("::")[0], len(ranks)))
    for item in items:
        if "real_model" in item.fixturenames:
            item.add_marker("real_model")
