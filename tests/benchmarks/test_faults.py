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
    output.write_text('{"vllm": "what it found before"}')
    command = [sys.executable, "benchmarks/faults/run.py", "--short", "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    areas = json.loads(output.read_text())
    assert areas.pop("vllm") == "what it found before"
    assert areas.keys() == {"configs", "rows", "rewards", "disk", "damage", "kills"}, (
        done.stdout[-3000:] + done.stderr[-3000:]
    )
    return {"status": done.returncode, "areas": areas}


def test_nothing_is_wrong(found):
    faults = [fault for area in found["areas"].values() for fault in area["faults"]]
    assert found["status"] == 0 and not faults, "\n".join(faults)


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
    rows = [row for one in found["areas"].values() for row in one["table"]]
    assert sum(row["tried"] for row in rows if row["area"].startswith(area)) >= least
