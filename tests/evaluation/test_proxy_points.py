"""Proxy points of made-up runs whose gold surface is known."""

import argparse
import json

import numpy as np
import pytest

from align.cli import proxy_points
from align.cli.main import main
from align.errors import ConfigError, DataError
from align.evaluation.proxy_points import (
    RIDGES,
    border,
    cross_validate,
    density,
    features,
    find_proxy_point,
    fit_surface,
    solve,
)
from align.evaluation.records import EvalWriter, read_run

TOP = {"helpful": 1.2, "polite": 0.6}


def gold_of(helpful, polite):
    return 2.0 - 1.5 * (helpful - TOP["helpful"]) ** 2 - 4.0 * (polite - TOP["polite"]) ** 2


def run_of(folder, name, path, *, prompts=64, noise=0.3, gold=True, rewards=("helpful", "polite"), seed=0):
    """A run that goes along `path`, a list of (helpful, polite) means."""
    rng = np.random.default_rng(seed)
    writer = EvalWriter(folder, name=name, method="remax", proxy="x", gold="g" if gold else None, seed=0, config={})
    for step, point in enumerate(path):
        columns = {f"rewards/{r}": x + noise * rng.normal(size=prompts) for r, x in zip(rewards, point, strict=True)}
        writer.write(
            step,
            kl=np.full(prompts, 0.1 * step),
            kl_k3=np.full(prompts, 0.1 * step),
            proxy=columns[f"rewards/{rewards[0]}"],
            gold=gold_of(*point) + noise * rng.normal(size=prompts) if gold else None,
            length=8,
            **columns,
        )
    return folder


def paths(end=2.2):
    """Runs that push one reward each, drifting in the other."""
    along = np.linspace(0, 1, 25)
    return {
        "a": [(0.2 + (end - 0.2) * t, 0.3 + 0.5 * t) for t in along],
        "b": [(0.2 + 0.9 * t, 0.3 + 0.9 * t) for t in along],
        "c": [(0.2 + (end - 0.2) * t, 0.3 + 0.15 * t) for t in along],
        "d": [(0.2 + 1.4 * t, 0.3 + 0.8 * t**2) for t in along],
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [run_of(folder / name, name, path, seed=i) for i, (name, path) in enumerate(paths().items())]


def test_the_maximum_of_the_surface_is_found_with_its_uncertainty(folders):
    found = find_proxy_point([read_run(folder) for folder in folders])
    assert found.rewards == ["helpful", "polite"]
    for i, name in enumerate(found.rewards):
        assert found.point[i] == pytest.approx(TOP[name], abs=0.12)
        assert found.low[i] - 0.02 <= TOP[name] <= found.high[i] + 0.02
        assert 0 < found.high[i] - found.low[i] < 0.5
    assert found.gold == pytest.approx(2.0, abs=0.1) and found.explained > 0.9 and not found.border


def test_more_prompts_make_the_interval_smaller(tmp_path):
    widths = []
    for prompts in (16, 256):
        places = [
            run_of(tmp_path / f"{name}{prompts}", name, path, prompts=prompts, seed=i)
            for i, (name, path) in enumerate(paths().items())
        ]
        found = find_proxy_point([read_run(place) for place in places])
        widths.append((found.high - found.low).sum())
    assert widths[1] < 0.6 * widths[0]


def test_a_maximum_that_was_not_passed_is_said_to_be_on_the_border(tmp_path, capsys):
    """Runs that stop before helpfulness does harm: the maximum is where they end."""
    short = [run_of(tmp_path / name, name, path, noise=0.05) for name, path in paths(end=0.9).items() if name in "ac"]
    found = find_proxy_point([read_run(folder) for folder in short])
    assert "helpful" in found.border
    call(*short, "--output_dir", tmp_path / "out")
    assert "warning: the maximum lies at the border of what the runs visited, along helpful" in capsys.readouterr().out


def call(*argv):
    parser = argparse.ArgumentParser()
    proxy_points.add_arguments(parser)
    return proxy_points.run(parser.parse_args([str(item) for item in argv]))


def test_the_command(folders, tmp_path, capsys):
    assert call(*folders, "--output_dir", tmp_path, "--degree", 3) == 0
    summary = json.loads((tmp_path / "proxy_points.json").read_text())
    assert summary["degree"] == 3 and summary["evaluations"] == 100 and len(summary["runs"]) == 4
    assert (tmp_path / "proxy_points.png").stat().st_size > 10_000 and (tmp_path / "proxy_points.svg").exists()
    out = capsys.readouterr().out
    assert f"- {{reward: helpful, direction: at_least, threshold: {summary['point']['helpful']:.4g}}}" in out


def test_one_reward(folders):
    found = find_proxy_point([read_run(folders[2])], ["helpful"])
    gold = [gold_of(*point) for point in paths()["c"]]
    best = paths()["c"][int(np.argmax(gold))][0]
    assert found.point[0] == pytest.approx(best, abs=0.15)


def test_a_surface_is_fitted_exactly_without_noise():
    rng = np.random.default_rng(0)
    points = rng.uniform(-3, 5, size=(200, 3))
    gold = 1 + points[:, 0] * points[:, 1] - 0.2 * points[:, 2] ** 3
    surface = fit_surface(points, gold, degree=3, ridge=0.0)
    assert features(np.zeros((1, 3)), 3).shape[1] == 20 and np.allclose(surface(points), gold, atol=1e-6)
    assert features(np.zeros((1, 2)), 10).shape[1] == 66  # the paper's
    _, explained = cross_validate(points, rng.normal(size=200), np.arange(200) % 10, 3)
    assert explained < 0.2  # noise is not explained out of fold


def test_the_penalty_is_the_largest_within_one_standard_error():
    rng = np.random.default_rng(0)
    points = rng.uniform(size=(40, 2))
    gold = np.sin(4 * points[:, 0]) + 0.5 * rng.normal(size=40)
    folds = np.arange(40) % 8
    chosen, explained = cross_validate(points, gold, folds, 4)
    low, high = points.min(0), points.max(0)
    design = features(2 * (points - low) / (high - low) - 1, 4)
    errors = []
    for ridge in RIDGES:
        held_out = np.array(
            [design[i] @ solve(design[folds != folds[i]], gold[folds != folds[i]], ridge) for i in range(40)]
        )
        errors.append((held_out - gold) ** 2)
    means = [error.mean() for error in errors]
    best = int(np.argmin(means))
    bound = means[best] + errors[best].std(ddof=1) / 40**0.5
    wanted = max(i for i, mean in enumerate(means) if mean <= bound)
    assert wanted > best and chosen == RIDGES[wanted]
    assert explained == pytest.approx(1 - means[wanted] / gold.var())


def test_border():
    allowed = np.zeros((4, 4), bool)
    allowed[1:, :3] = True
    assert border(allowed, (2, 1), ["a", "b"]) == []
    assert border(allowed, (1, 1), ["a", "b"]) == ["a"]
    assert border(allowed, (2, 2), ["a", "b"]) == ["b"]
    assert border(allowed, (3, 2), ["a", "b"]) == ["a", "b"]


def test_what_cannot_be_fitted_is_said(tmp_path, folders):
    blind = run_of(tmp_path / "blind", "blind", paths()["a"], gold=False)
    with pytest.raises(DataError, match="has no gold scores"):
        find_proxy_point([read_run(blind)])
    other = run_of(tmp_path / "other", "other", paths()["a"], rewards=("helpful", "short"))
    with pytest.raises(DataError, match="no evaluations of polite .there are helpful, short"):
        find_proxy_point([read_run(folders[0]), read_run(other)], ["helpful", "polite"])
    few = run_of(tmp_path / "few", "few", paths()["a"][:4])
    with pytest.raises(DataError, match="4 evaluations are too few"):
        find_proxy_point([read_run(few)])
    still = run_of(tmp_path / "still", "still", [(0.1 * i, 0.5) for i in range(20)], noise=0.0)
    with pytest.raises(DataError, match="polite never changed"):
        find_proxy_point([read_run(still)])
    with pytest.raises(DataError, match="different numbers of prompts"):
        find_proxy_point([read_run(folders[0]), read_run(run_of(tmp_path / "p", "p", paths()["b"], prompts=8))])


@pytest.mark.parametrize("dimensions", [1, 2])
def test_the_density_has_scotts_bandwidth_in_every_dimension(dimensions):
    points = np.random.default_rng(0).normal(size=(30, dimensions)) * [1.0, 5.0][:dimensions]
    at = points[:4] + 0.3
    bandwidth = [points[:, i].std(ddof=1) * 30 ** (-1 / (dimensions + 4)) for i in range(dimensions)]
    wanted = [
        np.mean(
            [
                np.exp(-sum(((x - p) / h) ** 2 for x, p, h in zip(a, point, bandwidth, strict=True)) / 2)
                for point in points
            ]
        )
        for a in at
    ]
    assert density(at, points) == pytest.approx(wanted)


def test_what_would_count_twice_or_is_no_share_is_refused(folders, capsys):
    runs = [str(folder) for folder in folders]
    for argv, said in (
        ([runs[0], runs[0]], "is given twice"),
        ([*runs, "--rewards", "polite", "polite"], "a reward is named twice"),
        ([*runs, "--mask_quantile", "2"], "mask_quantile is a share"),
        ([*runs, "--mask_quantile", "nan"], "mask_quantile is a share"),
    ):
        assert main(["proxy-points", *argv]) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(ConfigError, match="degree must be at least 1"):
        find_proxy_point([], degree=0)


@pytest.mark.parametrize("factor", [2.0**-600, 2.0**660])
def test_scores_in_any_unit_have_the_same_point(folders, factor):
    """Gold of 1e200 ended in an IndexError, of 1e-180 in a ridge of NaN: squares of it do not exist."""
    runs = [read_run(folder) for folder in folders]
    wanted = find_proxy_point(runs, resamples=50)
    for run in runs:
        for name in ("gold", "rewards/polite"):
            run.per_prompt[name] = run.per_prompt[name] * factor
    found = find_proxy_point(runs, resamples=50)
    units = [1.0, factor]
    assert found.gold == wanted.gold * factor and found.ridge == wanted.ridge and found.explained == wanted.explained
    for name in ("point", "low", "high", "visited"):
        assert (getattr(found, name) == getattr(wanted, name) * units).all(), name
    assert (found.surface == wanted.surface * factor).all() and (found.axes[1] == wanted.axes[1] * factor).all()
