"""Runs with very many evaluations: what is drawn of them, and what reading them holds."""

import json
import tracemalloc

import numpy as np
import pytest

from align.errors import DataError
from align.evaluation import interactive, plots
from align.evaluation.proxy_point_plot import plot_proxy_point
from align.evaluation.proxy_points import density, find_proxy_point
from align.evaluation.records import EvalWriter, Run, read_run
from align.evaluation.report import write_outputs
from align.evaluation.summary import build_summary
from align.evaluation.thin import POINTS, kept
from tests.evaluation.synthetic import without_checksums

EVALUATIONS, PROMPTS, PEAK = 4000, 24, 1234


def long_run(rewards=0, seed=0) -> Run:
    """Gold rises and falls, with one evaluation far above its neighbours."""
    rng = np.random.default_rng(seed)
    x = np.linspace(0, 1, EVALUATIONS)[:, None]
    noise = 0.1 * rng.normal(size=(3 + rewards, EVALUATIONS, PROMPTS))
    per_prompt = {"kl": 40 * x + noise[0] ** 2 + 1e-6, "proxy": 4 * x + noise[1], "gold": 4 * x * (1 - x) + noise[2]}
    per_prompt["gold"][PEAK] += 9
    per_prompt |= {f"rewards/r{i}": (1 + i - 2 * seed) * x + noise[3 + i] for i in range(rewards)}
    per_prompt |= {"kl_k3": per_prompt["kl"], "length": 20 + noise[0]}
    means = {key: per_prompt[key].mean(1) for key in ("kl", "kl_k3", "proxy", "gold", "length")}
    sample = [{"prompt": "p", "completion": "c", "proxy": 0.0, "gold": 0.0}]
    about = {"name": "long", "method": "rloo", "proxy_name": "rm", "gold_name": "judge", "seed": 0, "started": ""}
    return Run(**about, config={}, step=10 * np.arange(EVALUATIONS), **means, per_prompt=per_prompt,
               samples=[sample] * EVALUATIONS)  # fmt: skip


@pytest.fixture(scope="module")
def summary():
    return build_summary(runs={"one": long_run(), "two": long_run(seed=1)})


def test_what_is_kept_of_a_curve():
    values = np.random.default_rng(0).normal(size=100_000)
    values[77_777], values[5] = 90, -90
    found = kept(values.tolist())
    assert found == sorted(set(found)) and len(found) <= POINTS
    assert {0, 5, 77_777, 99_999} <= set(found)
    assert kept([3.0]) == [0] and kept([1.0] * 50) == list(range(50))


def test_a_page_draws_few_points_of_a_long_run_and_keeps_its_peak(summary):
    entries = summary["runs"]
    figures = [
        *interactive.proxy_and_gold(entries),
        interactive.all_gold(entries),
        *interactive.by_step(entries),
        *interactive.fits(entries, summary["fits"]["runs"]),
    ]
    assert len(figures) == 8
    for figure in figures:
        for curve in figure["curves"]:
            assert len(curve["x"]) <= POINTS and {len(curve[key]) for key in ("y", "low", "high") if key in curve} == {
                len(curve["x"])
            }
    (gold,) = [curve for curve in figures[0]["curves"] if curve["name"] == "gold"]
    top = int(np.argmax(gold["y"]))
    assert gold["labels"][top] == f"step {10 * PEAK}" and gold["x"][top] == entries["one"]["kl"][PEAK]
    assert gold["low"][top] < gold["y"][top] < gold["high"][top]
    assert (gold["labels"][0], gold["labels"][-1]) == ("step 0", f"step {10 * (EVALUATIONS - 1)}")
    (measured,) = [curve for curve in figures[-1]["curves"] if curve["name"] == "measured"]
    assert measured["x"][-1] == pytest.approx(np.sqrt(entries["two"]["kl"][-1]))


def test_pictures_draw_few_points_of_a_long_run(summary):
    entries = summary["runs"]
    drawn = [
        plots.plot_proxy_and_gold(entries, "runs"),
        plots.plot_gold(entries, "runs"),
        plots.plot_steps(entries),
        plots.plot_fits(entries, summary["fits"]["runs"], "runs"),
    ]
    lines = [line for figure in drawn for axis in figure.axes for line in axis.lines]
    bands = [path for figure in drawn for axis in figure.axes for of in axis.collections for path in of.get_paths()]
    assert len(lines) > 20 and max(len(line.get_xdata()) for line in lines) <= POINTS
    assert max(len(band.vertices) for band in bands) <= 2 * POINTS + 3  # a band is once around
    peaks = [line for line in lines if len(line.get_xdata()) > 100 and line.get_ydata().max() > 8]
    assert peaks
    fits = [line for line in drawn[-1].axes[0].lines if line.get_label().startswith("d(")]
    measured = [line for line in drawn[-1].axes[0].lines if line.get_label() not in [fit.get_label() for fit in fits]]
    bars = drawn[-1].axes[0].collections
    assert len(fits) == 2 and min(fit.zorder for fit in fits) > max(of.zorder for of in [measured[0], *bars])


def test_the_files_of_a_long_report_stay_small(summary, tmp_path):
    report, numbers = write_outputs(tmp_path, summary, title="t", intro="i")
    assert report.stat().st_size < 800_000
    assert all(path.stat().st_size < 800_000 for path in (tmp_path / "figures").iterdir())
    assert len(json.loads(numbers.read_text())["runs"]["one"]["gold"]) == EVALUATIONS  # every number is here


def test_a_proxy_point_of_many_evaluations():
    tracemalloc.start()
    found = find_proxy_point([long_run(2), long_run(2, seed=1)], degree=2, resamples=5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found.visited) == 2 * EVALUATIONS and peak < 150e6  # [8000, 8000, 2] are 1,024e6
    dots = [of for of in plot_proxy_point(found).axes[0].collections if len(of.get_offsets()) > 10]
    assert [len(of.get_offsets()) <= POINTS for of in dots] == [True]


def test_the_density_is_the_sum_of_kernels():
    rng = np.random.default_rng(0)
    points, at = rng.normal(size=(40, 2)), rng.normal(size=(7, 2))
    width = points.std(0, ddof=1) * 40 ** (-1 / 6)
    expected = [np.mean([np.exp(-0.5 * (((a - p) / width) ** 2).sum()) for p in points]) for a in at]
    np.testing.assert_allclose(density(at, points), expected, rtol=1e-12)


def writer(folder) -> EvalWriter:
    return EvalWriter(folder, name="r", method="rloo", proxy="rm", gold="judge", seed=0, config={})


def test_reading_holds_numbers_and_not_their_text(tmp_path):
    of, rng = writer(tmp_path), np.random.default_rng(0)
    for step in range(300):
        columns = dict(zip(("kl", "kl_k3", "proxy", "gold", "length"), rng.random((5, 500)), strict=True))
        of.write(step, **columns)
    tracemalloc.start()
    run = read_run(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert run.per_prompt["gold"].shape == (300, 500) and run.per_prompt["gold"].dtype == np.float64
    assert peak < 15e6  # the numbers are 6e6 bytes, as lists 24e6, as text 8e6


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("proxy", [1.0, None], "line 3: proxy of per_prompt holds something that is no finite number"),
        ("gold", [1.0, "2"], "line 3: gold of per_prompt holds"),
        ("gold", [True, 1.0], "line 3: gold of per_prompt holds"),
        ("kl", [[1.0], [2.0]], "line 3: kl of per_prompt holds"),
        ("kl", "a", "line 3: kl is 'a', no finite number"),
        ("entropy", [1.0], r"line 3: entropy is \[1.0\], no finite number"),
        ("entropy", {"a": 1}, "line 3: entropy is"),
    ],
)
def test_what_is_no_number_is_an_error_with_its_line(tmp_path, key, value, message):
    of = writer(tmp_path)
    for step in (0, 10):
        of.write(step, kl=[0.0, 1.0], kl_k3=[0.0, 1.0], proxy=[1.0, 2.0], gold=[1.0, 2.0], length=[3, 4])
    lines = without_checksums(of.path)
    record = json.loads(lines[2])
    (record["per_prompt"] if isinstance(value, list) and key != "entropy" else record)[key] = value
    of.path.write_text("\n".join([*lines[:2], json.dumps(record)]) + "\n")
    with pytest.raises(DataError, match=message):
        read_run(tmp_path)


def test_infinite_numbers_and_empty_lists_are_errors(tmp_path):
    of = writer(tmp_path)
    of.write(0, kl=[0.0, 1.0], kl_k3=[0.0, 1.0], proxy=[1.0, 2.0], gold=[1.0, 2.0], length=[3, 4])
    lines = without_checksums(of.path)
    of.path.write_text("\n".join(lines).replace('"proxy": [1.0, 2.0]', '"proxy": [1e999, 2.0]') + "\n")
    with pytest.raises(DataError, match="line 2: proxy of per_prompt"):
        read_run(tmp_path)
    record = json.loads(lines[1])
    record["per_prompt"] = dict.fromkeys(record["per_prompt"], [])
    of.path.write_text("\n".join([lines[0], json.dumps(record)]) + "\n")
    with pytest.raises(DataError, match="line 2 has no prompt"):
        read_run(tmp_path)
