"""The campaign of benchmarks/faults in its short form: nothing may be wrong, and every area is tried."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from align.methods import METHODS
from benchmarks.faults.world import RUNS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    output = tmp_path_factory.mktemp("faults") / "table.json"
    command = [sys.executable, "benchmarks/faults/run.py", "--short", "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert output.exists(), done.stdout[-3000:] + done.stderr[-3000:]
    return {"status": done.returncode, **json.loads(output.read_text())}


def test_nothing_is_wrong(found):
    assert found["status"] == 0 and not found["faults"], "\n".join(found["faults"])


def test_every_method_is_killed():
    assert set(METHODS) <= {run.method for run in RUNS.values()}


@pytest.mark.parametrize(
    "area, least",
    [
        ("killed", 5),
        ("damaged", 24),
        ("generated configs", 300),
        ("generated rows", 300),
        ("hostile rewards", 100),
        ("hostile servers", 30),
        ("disk full", 2),
        ("read-only", 5),
    ],
)
def test_every_area_is_tried(found, area, least):
    assert sum(row["tried"] for row in found["table"] if row["area"].startswith(area)) >= least
