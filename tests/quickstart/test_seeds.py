"""The recorded quickstarts: of the present settings, and what the README shows of them."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from align.quickstart.parts import RUNS
from align.quickstart.settings import FULL
from benchmarks.quickstart_seeds import ALL_PAIRS, ENSEMBLES, RESULT, SINGLE, table

ROOT = Path(__file__).parents[2]
REPORTS = {
    "transformers": json.loads(RESULT.read_text()),
    "vllm": json.loads(RESULT.with_name("quickstart_seeds_vllm.json").read_text()),
}


@pytest.mark.parametrize("backend", REPORTS)
def test_they_were_run_with_the_present_settings(backend):
    assert REPORTS[backend]["settings"] == asdict(replace(FULL, backend=backend))
    assert list(REPORTS[backend]["seeds"]) == ["0", "1", "2", "3", "4"]


def test_the_readme_shows_every_seed():
    assert table(REPORTS["transformers"]["seeds"]) in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("backend", REPORTS)
@pytest.mark.parametrize("seed", REPORTS["transformers"]["seeds"])
def test_above_says_that_the_intervals_do_not_overlap(backend, seed):
    runs = REPORTS[backend]["seeds"][seed]["runs"]
    assert set(runs) == {*RUNS, ALL_PAIRS}
    for name in ENSEMBLES:
        assert runs[name]["above"] == (runs[name]["end_interval"][0] > runs[SINGLE]["end_interval"][1])
        low, high = runs[name]["end_interval"]
        assert low < runs[name]["end"] < high and runs[name]["prompts"] == FULL.eval_prompts


@pytest.mark.parametrize(
    ("backend", "above_worst_case", "above_uncertainty_weighted"), [("transformers", 3, 1), ("vllm", 1, 1)]
)
def test_what_the_pages_say_of_the_seeds(backend, above_worst_case, above_uncertainty_weighted):
    """README.md and docs/overoptimization.md; a new record that says something else needs other words there."""
    seeds = [found["runs"] for found in REPORTS[backend]["seeds"].values()]
    for runs in seeds:
        assert runs[SINGLE]["verdict"] == "over-optimised" and all(runs[name]["above"] for name in ENSEMBLES)
        assert runs[ALL_PAIRS]["end_interval"][0] > runs[SINGLE]["end_interval"][1]
    above = [sum(runs[ALL_PAIRS]["end"] > runs[name]["end"] for runs in seeds) for name in ENSEMBLES]
    assert above == [above_worst_case, above_uncertainty_weighted]


def test_what_the_page_says_of_vllm():
    page = (ROOT / "docs" / "overoptimization.md").read_text()
    ends = {
        name: sorted(found["runs"][name]["end"] for found in REPORTS["vllm"]["seeds"].values())
        for name in (*RUNS, ALL_PAIRS)
    }
    texts = {
        name: f"{values[0]:.2f} {'and' if name == SINGLE else 'to'} {values[-1]:.2f}" for name, values in ends.items()
    }
    for text in texts.values():
        assert text in page
