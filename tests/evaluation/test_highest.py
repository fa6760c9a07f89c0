"""How far the highest evaluation lies above another one: intervals against worlds whose truth is known."""

import math

import numpy as np
import pytest

from align.evaluation.highest import NORMAL, Highest, student
from align.evaluation.peak import analyse_peak


def test_quantiles_of_student():
    """Against published tables of t at 97.5 %."""
    for freedom, quantile in {4: 2.7764, 9: 2.2622, 19: 2.0930, 30: 2.0423, 100: 1.9840}.items():
        assert student(NORMAL, freedom) == pytest.approx(quantile, abs=0.01)


def curves(trial: int, means, prompts: int) -> np.ndarray:
    rng = np.random.default_rng(trial)
    return np.asarray(means)[:, None] + rng.normal(size=prompts) + rng.normal(size=(len(means), prompts))


@pytest.mark.parametrize("means", [np.zeros(9), np.array([0, 1, 1, 1, 1, 1, 0.6])])
def test_intervals_hold_the_truth(means):
    """2.5 % of 120 trials are 3 on either side; with the observed peak taken as given they are several times that."""
    low = high = as_given = 0
    fall, count = means.max() - means[-1], 30
    for trial in range(120):
        gold = curves(trial, means, count)
        found = Highest(gold, seed=trial)
        interval = found.above(len(means) - 1)
        low, high = low + (interval[0] > fall + 1e-9), high + (interval[1] < fall - 1e-9)
        falls = gold[found.index] - gold[-1]
        as_given += falls.mean() - 2.04 * falls.std(ddof=1) / math.sqrt(count) > fall
    assert low <= 8 and high <= 8 and as_given > 2 * low


def test_the_interval_holds_what_is_shown():
    """A fall that lay above its own interval was shown beside it."""
    for trial in range(30):
        peak = analyse_peak(curves(trial, np.zeros(20), 30), curves(trial + 99, np.zeros(20), 30))
        assert peak.gain_interval[0] <= peak.gain <= peak.gain_interval[1]
        if peak.drop_interval is not None:
            assert peak.drop_interval[0] <= peak.drop <= peak.drop_interval[1]
        if peak.drop_share_interval is not None:
            assert peak.drop_share_interval[0] <= peak.drop_share <= peak.drop_share_interval[1]


def test_the_share_is_fiellers():
    """Its bounds s are where the mean of the fall minus s times the gain is 0 by just so many standard errors."""
    gold = curves(0, [0.0, 3.0, 2.0], 60)
    found = Highest(gold)
    assert found.possible.tolist() == [False, True, False]
    for bound in found.share_lost():
        values = gold[1] - gold[2] - bound * (gold[1] - gold[0])
        t = abs(values.mean()) / (values.std(ddof=1) / math.sqrt(60))
        assert t == pytest.approx(student(NORMAL, 59), rel=1e-6)
    assert Highest(curves(0, [0.0, 0.1, -3.0], 60)).share_lost()[1] == math.inf  # no gain that chance could not make


def test_scores_of_any_size_and_without_spread():
    gold = curves(0, [0.0, 2.0, 1.0], 30)
    for size in (1e-200, 1e200):
        scaled = Highest(size * gold)
        assert scaled.above(2) == pytest.approx([size * x for x in Highest(gold).above(2)])
    constant = Highest(np.array([0.1, 0.7, 0.3])[:, None] + np.zeros(30))
    assert constant.above(0) == pytest.approx((0.6, 0.6)) and constant.above(2) == pytest.approx((0.4, 0.4))
    assert constant.possible.tolist() == [False, True, False]
