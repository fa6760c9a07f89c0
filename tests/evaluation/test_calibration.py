"""Calibration: counted by hand, and on margins whose true probability is known."""

import math

import numpy as np
import pytest

from align.evaluation.calibration import best_scale, reliability


def logit(p):
    return math.log(p / (1 - p))


def test_by_hand():
    # two bins, [0.5, 0.75) and [0.75, 1]: confidences 0.6 (right), 0.7 (wrong), 0.5 (a tie) | 0.9 (right), 0.8 (wrong)
    margins = [logit(0.6), -logit(0.7), 0.0, logit(0.9), -logit(0.8)]
    curve = reliability(margins, bins=2)
    assert curve.edges.tolist() == [0.5, 0.75, 1.0] and curve.count.tolist() == [3, 2]
    assert curve.confidence == pytest.approx([0.6, 0.85]) and curve.accuracy == pytest.approx([0.5, 0.5])
    assert curve.ece == pytest.approx(3 / 5 * 0.1 + 2 / 5 * 0.35)


def test_against_a_loop():
    margins = np.random.default_rng(0).normal(0.4, 1.5, 500)
    bins = 10
    total = 0.0
    for b in range(bins):
        low, high = 0.5 + b * 0.05, 0.5 + (b + 1) * 0.05
        inside = [m for m in margins if low <= 1 / (1 + math.exp(-abs(m))) < high or (b == bins - 1 and abs(m) > 40)]
        if inside:
            right = sum(m > 0 for m in inside) / len(inside)
            sure = sum(1 / (1 + math.exp(-abs(m))) for m in inside) / len(inside)
            total += len(inside) / len(margins) * abs(right - sure)
    assert reliability(margins).ece == pytest.approx(total)


def test_calibrated_margins_have_no_error_and_doubled_ones_do():
    rng = np.random.default_rng(1)
    size = rng.exponential(1.0, 100_000)
    margins = np.where(rng.random(size.shape) < 1 / (1 + np.exp(-size)), size, -size)
    assert reliability(margins).ece < 0.01
    assert reliability(2 * margins).ece > 0.05
    assert best_scale(margins) == pytest.approx(1.0, abs=0.03)
    assert best_scale(2 * margins) == pytest.approx(0.5, abs=0.015)


def test_sure_and_right_is_zero_and_sure_and_wrong_is_one():
    assert reliability([50.0, 60.0]).ece == pytest.approx(0.0)
    assert reliability([-50.0, -60.0]).ece == pytest.approx(1.0)
    assert reliability([0.0, 0.0]).ece == pytest.approx(0.0)  # undecided, and half right
    empty = reliability([50.0])
    assert math.isnan(empty.accuracy[0]) and empty.count.sum() == 1


def test_best_scale_is_the_maximum_of_the_likelihood_or_does_not_exist():
    margins = np.array([300.0, -100.0, 50.0, 80.0, -20.0])
    scale = best_scale(margins)

    def loss(a):
        return np.logaddexp(0, -a * margins).sum()

    assert all(loss(scale) < loss(scale * factor) for factor in (0.5, 0.9, 1.1, 2))
    assert best_scale([1.0, 2.0]) is None and best_scale([-2.0, 1.0]) is None and best_scale([0.0, 0.0]) is None


@pytest.mark.parametrize("margins", [[], [1.0, math.nan], [math.inf]])
def test_numbers_that_are_no_margins_are_refused(margins):
    with pytest.raises(ValueError, match="finite margins"):
        reliability(margins)


def test_soft_labels_by_hand_and_their_best_scale():
    margins, labels = np.array([logit(0.8), -logit(0.8), logit(0.8)]), np.array([0.7, 0.7, 1.0])
    curve = reliability(margins, bins=1, labels=labels)
    assert curve.accuracy == pytest.approx([(0.7 + 0.3 + 1.0) / 3])
    assert curve.ece == pytest.approx(abs(2 / 3 - 0.8))
    scores = np.random.default_rng(0).normal(0, 2, 500)
    assert best_scale(3 * scores, 1 / (1 + np.exp(-scores))) == pytest.approx(1 / 3)  # labels that the scores made
    assert best_scale([1.0, -1.0], [1.0, 0.0]) is None and best_scale([1.0], [0.9]) == pytest.approx(logit(0.9))


@pytest.mark.parametrize(("pairs", "shown"), [(50, 0.14), (200, 0.07), (1000, 0.03)])
def test_what_a_calibrated_reward_shows_by_chance(pairs, shown):
    """Its mean error over draws of the labels, by drawing them; docs/reward_evaluation.md has the numbers."""
    rng = np.random.default_rng(0)
    size = np.abs(rng.normal(size=pairs)) * 1.5
    drawn = [
        reliability(np.where(rng.random(pairs) < 1 / (1 + np.exp(-size)), size, -size)).ece for _ in range(300)
    ]  # fmt: skip
    assert reliability(size).by_chance == pytest.approx(np.mean(drawn), rel=0.05)
    assert reliability(size).by_chance == pytest.approx(shown, abs=0.01)
