"""Bootstraps of many evaluations, prompts or pairs: the same numbers from tiles, in bounded memory."""

import tracemalloc
from contextlib import contextmanager

import numpy as np
import pytest

from align.evaluation import bootstrap
from align.evaluation.bootstrap import (
    mean_interval,
    percentile_interval,
    resample_weights,
    resampled_means,
    weight_tiles,
)
from align.evaluation.compare import RIDGE, summarise
from align.evaluation.fits import FORMS, fit_gao_bootstrap, gao_rl
from align.evaluation.front import Front, Point
from align.evaluation.front_scores import REFERENCE, PolicyScores
from align.evaluation.front_scores import summarise as summarise_fronts
from align.evaluation.peak import analyse_peak

MOST = 120e6  # bytes; [1000, 20_000] are 160e6


@contextmanager
def bounded_memory():
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MOST, f"{peak / 1e6:.0f} MB"


def curve(evaluations, prompts, seed=0):
    """KL, proxy and gold [K, P] of a run that is over-optimised."""
    rng = np.random.default_rng(seed)
    kl = np.linspace(0, 40, evaluations)[:, None] * (1 + 0.1 * rng.normal(size=(evaluations, prompts)))
    d = np.sqrt(np.maximum(kl, 0)).mean(1, keepdims=True)
    noise = rng.normal(size=(2, evaluations, prompts))
    return kl, d + noise[0], gao_rl(d, 1.2, 0.7) + noise[1]


def pairs(count, answers=2):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 60, size=(count, 2))
    rows = [({"row": i // answers, "completion": "x" * a}, {"completion": "x" * b}) for i, (a, b) in enumerate(lengths)]
    return rows, np.where(rng.random(count) < 0.1, 0.5, rng.random(count) < 0.4 + 0.005 * lengths[:, 0])


def fronts(prompts):
    rng = np.random.default_rng(0)

    def policy(shift):
        return PolicyScores(shift + rng.normal(size=(prompts, 2)), rng.random(prompts), rng.random(prompts), [])

    points = [Point(f"w{i}", "", {}) for i in range(2)]
    given = {name: Front("sweep", "base", ["a", "b"], points) for name in ("one", "two")}
    found = {name: [policy(0.1 * i) for i in range(2)] for name in given}
    return given, {REFERENCE: [policy(0)], **found}, ["a", "b"]


MEASURED = {
    "interval of many evaluations": lambda k: mean_interval(curve(k, 8)[2].T),
    "interval of many prompts": lambda k: mean_interval(curve(3, k)[2].T),
    "peak of many evaluations": lambda k: analyse_peak(*curve(k, 24)[1:]),
    "peak of many prompts": lambda k: analyse_peak(*curve(3, k)[1:]),
    "fit of many evaluations": lambda k: fit_gao_bootstrap("rl", *curve(k, 8)[::2], 1.0),
    "fit of many prompts": lambda k: fit_gao_bootstrap("bon", [0.0, 1.0, 4.0, 9.0], curve(4, k)[2], 1.0),
    "many pairs": lambda k: summarise(*pairs(k)),
    "fronts of many prompts": lambda k: summarise_fronts(*fronts(k)),
}  # fmt: skip


@pytest.mark.parametrize("what", MEASURED)
def test_memory_is_bounded(what):
    with bounded_memory():
        MEASURED[what](20_000)


def flat(value):
    """Every number of a result, in order."""
    if isinstance(value, dict):
        return [x for item in value.values() for x in flat(item)]
    if isinstance(value, list | tuple | np.ndarray):
        return [x for item in value for x in flat(item)]
    if hasattr(value, "__dict__"):
        return flat(vars(value))
    return [] if value is None or isinstance(value, str) else [float(value)]


@pytest.mark.parametrize("what", MEASURED)
def test_the_size_of_tiles_changes_nothing(what, monkeypatch):
    whole = flat(MEASURED[what](60))
    monkeypatch.setattr(bootstrap, "TILE", 1_000)
    monkeypatch.setattr(bootstrap, "IN_CACHE", 100)
    assert whole and np.array(flat(MEASURED[what](60))) == pytest.approx(np.array(whole), rel=1e-12, abs=1e-12)


def test_tiles_are_the_resamples_as_they_were_drawn_at_once():
    for prompts, seed in ((1, 0), (7, 3), (300, (2, 1))):
        drawn = np.random.default_rng(seed).integers(prompts, size=(1000, prompts))
        counts = np.stack([np.bincount(row, minlength=prompts) for row in drawn])
        np.testing.assert_array_equal(resample_weights(prompts, seed=seed), counts / prompts)
        tiles = list(weight_tiles(prompts, 100_000, seed=seed))
        assert len(tiles) > 10
        np.testing.assert_array_equal(np.concatenate(tiles), counts / prompts)


def test_intervals_are_numpys_quantiles_of_the_means():
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(30, 5)), rng.normal(size=30)
    weights = resample_weights(30, seed=4)
    samples = resampled_means([one, other], seed=4)
    np.testing.assert_allclose(samples[0], weights @ one, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(samples[1], weights @ other, rtol=1e-12, atol=1e-14)
    expected = [np.quantile(samples[0], q, axis=0, method=m) for q, m in ((0.025, "lower"), (0.975, "higher"))]
    np.testing.assert_array_equal(mean_interval(one, seed=4), expected)
    for size in (1, 2, 3, 200, 1000, 1001):
        values = rng.normal(size=size)
        found = percentile_interval(values)
        assert found == (np.quantile(values, (1 - 0.95) / 2, method="lower"), values.max()) or size > 3
        assert found[1] == np.quantile(values, 1 - (1 - 0.95) / 2, method="higher")
    low, high = percentile_interval(np.array([[np.nan, 1.0], [2.0, 2.0]]))
    assert np.isnan([low[0], high[0]]).all() and (low[1], high[1]) == (1, 2)


def test_newtons_method_ends_where_it_has_converged():
    """The regression at equal length against plain gradient descent."""
    rows, preference = pairs(300)
    longer = np.array([len(one["completion"]) - len(other["completion"]) for one, other in rows], dtype=float)
    columns = np.column_stack([np.ones(300), np.tanh(longer / longer.std())])
    theta = np.zeros(2)
    for _ in range(5000):
        theta -= columns.T @ (1 / (1 + np.exp(-columns @ theta)) - preference) / 300 + RIDGE * theta
    expected = 1 / (1 + np.exp(-theta[0]))
    assert summarise(rows, preference)["at_equal_length"]["value"] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_a_resample_that_has_lost_the_distance_between_evaluations_is_no_fit(form):
    """KL that differs on one prompt of 20: a third of the resamples lack it, and leave two equal points."""
    kl = np.zeros((4, 20))
    kl[1:] = 1.0
    kl[2, 7], kl[3, 7] = 4.0, 9.0
    gold = np.array([0.0, 1.0, 1.2, 1.3])[:, None] + 0.1 * np.random.default_rng(0).normal(size=(4, 20))
    fit = fit_gao_bootstrap(form, kl, gold, 1.0)
    assert fit is not None and all(abs(end) < 1e4 for name in ("alpha", "beta") for end in fit.intervals[name])
