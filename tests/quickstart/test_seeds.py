"""The recorded quickstarts: of the present settings, and what the README shows of them."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from align.quickstart.parts import RUNS
from align.quickstart.settings import FULL
from benchmarks.quickstart_seeds import ENSEMBLES, RESULT, SINGLE, table

REPORT = json.loads(RESULT.read_text())


def test_they_were_run_with_the_present_settings():
    assert REPORT["settings"] == asdict(replace(FULL, backend=REPORT["settings"]["backend"]))


def test_the_readme_shows_every_seed():
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert table(REPORT["seeds"]) in readme


@pytest.mark.parametrize("seed", REPORT["seeds"])
def test_above_says_that_the_intervals_do_not_overlap(seed):
    runs = REPORT["seeds"][seed]["runs"]
    assert set(runs) == set(RUNS)
    for name in ENSEMBLES:
        assert runs[name]["above"] == (runs[name]["end_interval"][0] > runs[SINGLE]["end_interval"][1])
        low, high = runs[name]["end_interval"]
        assert low < runs[name]["end"] < high and runs[name]["prompts"] >= 512
