"""The sizes of real use: the page has what was measured, and the commands run on small inputs."""

import json
from pathlib import Path

import pytest

from benchmarks.evaluation_size import CASES, measure, table

ROOT = Path(__file__).parents[2]


def test_the_page_has_the_record():
    cases = json.loads((ROOT / "benchmarks" / "results" / "evaluation_size.json").read_text())["cases"]
    assert list(cases) == list(CASES)
    for case, (_, sizes) in CASES.items():
        assert {key: cases[case][key] for key in sizes} == sizes
    assert table(cases) in (ROOT / "docs" / "overoptimization.md").read_text()


@pytest.mark.parametrize("case", ["many evaluations", "long runs"])
def test_a_case_runs(case, tmp_path):
    found = measure(case, tmp_path, small=True)
    assert found["peak_mib"] > 30 and found["cpu_seconds"] > 0 and found["page_kib"] > 10
