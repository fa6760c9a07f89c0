"""The coverage of intervals of a fall: the page has the record, the record holds what is stated, a small world runs."""

import json
from dataclasses import asdict
from pathlib import Path

from benchmarks.peak_coverage import LOOKS, STOPS, WORLDS, World, measure, stopped, table

ROOT = Path(__file__).parents[2]


def test_the_page_has_the_record():
    found = json.loads((ROOT / "benchmarks" / "results" / "peak_coverage.json").read_text())
    for name, worlds in (("worlds", WORLDS), ("stops", STOPS)):
        assert [{key: entry[key] for key in asdict(World("", "", 0, 0))} for entry in found[name]] == list(
            map(asdict, worlds)
        )
    assert table(found) in (ROOT / "docs" / "overoptimization.md").read_text()


def test_a_world_runs():
    found = measure(World("last point", "rare", 4, 25), 3)
    assert found["true_fall"] == 0.015 and found["fall_low"] <= 100 and found["taken_as_given"] >= 0
    assert stopped(World("falling", "bounded", 12, 200), 1)["patience 3"] == 100 and LOOKS == 100
