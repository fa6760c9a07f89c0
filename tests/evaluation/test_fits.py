"""The forms of Gao et al.: the published formulas, known coefficients found again, a wrong form told apart."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from align.evaluation import fits
from align.evaluation.fits import extrapolation_check, fit_gao, fit_gao_bootstrap, gao_bon, gao_rl

D = np.sqrt(np.linspace(0.2, 30, 25))


def test_vector_gao_forms():
    folder = Path(os.environ.get("ALIGN_VECTORS", Path(__file__).parents[1] / "vectors"))
    vectors = json.loads((folder / "constrained_ensembles.json").read_text())["vectors"]
    vector = next(v for v in vectors if v["id"] == "gao_forms")
    given, expected = vector["inputs"], vector["outputs"]
    bon, rl = (given["alpha_bon"], given["beta_bon"]), (given["alpha_rl"], given["beta_rl"])
    np.testing.assert_allclose(gao_bon(given["d"], *bon), expected["R_bon"], rtol=1e-12)
    np.testing.assert_allclose(gao_rl(given["d"], *rl), expected["R_rl"], rtol=1e-12)
    np.testing.assert_allclose(fits.gao_bon_peak(*bon), expected["bon_opt"], rtol=1e-12)
    np.testing.assert_allclose(fits.gao_rl_peak(*rl), expected["rl_opt"], rtol=1e-12)
    assert gao_bon(expected["bon_zero"], *bon) == pytest.approx(0, abs=1e-12)
    assert gao_rl(expected["rl_zero"], *rl) == pytest.approx(0, abs=1e-12)


def test_forms_are_zero_at_zero_and_peak_where_they_say():
    grid = np.linspace(0, 12, 200_001)
    for function, peak in ((gao_bon, fits.gao_bon_peak), (gao_rl, fits.gao_rl_peak)):
        values = function(grid, 0.9, 0.4)
        assert values[0] == 0
        d, score = peak(0.9, 0.4)
        assert grid[values.argmax()] == pytest.approx(d, abs=1e-4)
        assert values.max() == pytest.approx(score, abs=1e-8)


@pytest.mark.parametrize("form", fits.FORMS)
def test_exact_data_gives_the_coefficients_back(form):
    score = fits.FUNCTIONS[form](D, 1.1, 0.37)
    fit = fit_gao(form, np.concatenate([[0.0], D]), np.concatenate([[0.0], score]))
    assert (fit.alpha, fit.beta) == (pytest.approx(1.1), pytest.approx(0.37))
    assert fit.points == len(D) and fit.r2 == pytest.approx(1) and fit.rmse < 1e-10


@pytest.mark.parametrize(("form", "other"), [("bon", "rl"), ("rl", "bon")])
def test_the_wrong_form_fits_and_predicts_worse(form, other):
    score = fits.FUNCTIONS[form](D, 1.1, 0.37) + 0.01 * np.random.default_rng(0).normal(size=D.size)
    right, wrong = fit_gao(form, D, score), fit_gao(other, D, score)
    assert wrong.rmse > 3 * right.rmse
    cut = D.max() * 0.7
    assert (
        extrapolation_check(other, D, score, cut)["rmse_right"]
        > 3 * extrapolation_check(form, D, score, cut)["rmse_right"]
    )


@pytest.mark.parametrize("form", fits.FORMS)
def test_intervals_hold_the_truth_about_as_often_as_they_say(form):
    alpha, beta, hits = 1.1, 0.37, np.zeros(3)
    truth = (alpha, beta, fits.PEAKS[form](alpha, beta)[0])
    d = np.concatenate([[0.0], D])
    trials = 40
    for trial in range(trials):
        rng = np.random.default_rng(trial)
        gold = (
            5
            + 2 * fits.FUNCTIONS[form](d, alpha, beta)[:, None]
            + rng.normal(size=(1, 50))
            + rng.normal(size=(d.size, 50))
        )
        kl = d[:, None] ** 2 * (1 + 0.1 * rng.normal(size=(d.size, 50)))
        fit = fit_gao_bootstrap(form, kl, gold, unit=2.0, seed=trial)
        for i, name in enumerate(("alpha", "beta", "peak_d")):
            low, high = fit.intervals[name]
            hits[i] += (low is None or low <= truth[i]) and (high is None or truth[i] <= high)
    assert np.all(hits >= 0.825 * trials), hits
    assert hits.sum() < 3 * trials  # intervals that never miss would be too wide


def test_the_peak_is_honest_about_the_data():
    inside = fit_gao("bon", D, gao_bon(D, 1.0, 0.2))
    assert inside.peak_status == "measured" and inside.peak_d == pytest.approx(2.5)
    beyond = fit_gao("bon", D, gao_bon(D, 1.0, 0.05))
    assert beyond.peak_status == "not reached in the data" and beyond.peak_d == pytest.approx(10)
    before = fit_gao("rl", D, gao_rl(D, -0.5, 1.0))
    assert before.peak_status == "before the data" and before.peak_d == pytest.approx(np.exp(-1.5))
    for form, alpha, beta in (("bon", 1.0, -0.1), ("rl", 1.0, -0.1), ("bon", -1.0, 0.1), ("bon", -1.0, -0.1)):
        never = fit_gao(form, D, fits.FUNCTIONS[form](D, alpha, beta))
        assert never.peak_status == "none" and never.peak_d is None and never.peak_score is None


def test_too_few_points_are_no_fit():
    assert fit_gao("bon", [0, 1, 2], [0, 1, 1]) is None
    assert fit_gao("rl", [1, 1, 1, 2], [1, 1, 1, 1]) is None
    assert fit_gao("rl", [1, 2, 3], [1, 1, 1]) is not None
    assert extrapolation_check("bon", D, D, cut=D.max()) is None
    assert extrapolation_check("bon", D, D, cut=D[1]) is None


def test_an_unbounded_peak_interval_is_none_not_a_number():
    rng = np.random.default_rng(0)
    d = np.array([0.0, 0.4, 0.8, 1.2, 1.6])
    gold = gao_bon(d, 1.0, 0.02)[:, None] + rng.normal(size=(5, 30))
    fit = fit_gao_bootstrap("bon", d**2, gold, unit=1.0)
    assert fit.intervals["peak_d"][1] is None
    assert np.isfinite(fit.intervals["alpha"]).all()
