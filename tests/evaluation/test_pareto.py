"""Dominance, hulls and distances of fronts, against brute force."""

import numpy as np
import pytest

from align.errors import ConfigError
from align.evaluation.pareto import above_front, dominated_share, dominates, non_dominated


def test_non_dominated_is_brute_force():
    points = np.random.default_rng(0).integers(0, 6, (60, 3)).astype(float)
    expected = [
        not any((q >= p).all() and (q > p).any() for q in points) for p in points
    ]  # equal points do not dominate each other
    assert non_dominated(points).tolist() == expected and 0 < sum(expected) < 60


def test_dominates():
    a, b = np.array([1.0, 2.0]), np.array([1.0, 1.0])
    assert dominates(a, b) and not dominates(b, a) and not dominates(a, a)


def test_dominated_share_counts_resamples():
    points = np.array([[[0.0, 0.0]], [[0.0, 5.0]], [[9.0, 9.0]], [[1.0, 1.0]]])
    others = np.array([[[1.0, 1.0], [2.0, 0.0]]] * 4)
    assert dominated_share(points, others).tolist() == [0.25]  # (1, 1) is not dominated by its like


def test_distance_above_a_front():
    front = np.array([[0.0, 4.0], [1.0, 3.5], [1.5, 1.0], [3.0, 1.0], [4.0, 0.0], [0.0, 0.0]])
    hull = [(0, 4), (1, 3.5), (4, 0)]  # (3, 1) lies under the line from (1, 3.5) to (4, 0)
    points = np.array([[0.0, 4.0], [1.0, 3.5], [2.5, 1.75], [5.0, -1.0], [-1.0, 4.5], [3.0, 3.0], [0.0, 0.0]])
    found = above_front(points, front)
    assert found[:3] == pytest.approx(0, abs=1e-12)  # corners, and the middle of an edge
    assert found[3:5] == pytest.approx([1.0, 0.5])  # beyond the ends
    assert found[5] > 0 > found[6]
    # by brute force: the smallest step back that lands under some mixture of two corners
    for point, distance in zip(points[5:], found[5:], strict=True):
        steps = np.linspace(-5, 5, 4001)
        corners = np.array(hull, dtype=float)
        shares = np.linspace(0, 1, 501)[:, None]
        mixtures = np.concatenate([shares * p + (1 - shares) * q for p, q in zip(corners, corners[1:], strict=False)])
        reached = [(mixtures >= point - t).all(1).any() for t in steps]
        assert steps[np.argmax(reached)] == pytest.approx(distance, abs=0.01)
    with pytest.raises(ConfigError, match="two objectives"):
        above_front(np.zeros((1, 3)), np.zeros((1, 3)))
