from fractions import Fraction
from itertools import combinations
from math import comb

import numpy as np
import pytest

from align.errors import DataError
from align.objectives.best_of_n import bon_expected, bon_kl, bon_weights


def test_against_brute_force():
    rng = np.random.default_rng(0)
    selection, values = rng.normal(size=(3, 7)), rng.normal(size=(3, 7))
    for n in range(1, 8):
        subsets = [np.array(s) for s in combinations(range(7), n)]
        brute = [np.mean([values[p, s[np.argmax(selection[p, s])]] for s in subsets]) for p in range(3)]
        np.testing.assert_allclose(bon_expected(selection, values, [n])[:, 0], brute, rtol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 512, 6_000, 12_500, 12_600])
def test_weights_are_exact_at_the_papers_size(n):
    N = 12_600
    weights = bon_weights(N, n)
    assert weights.sum() == pytest.approx(1.0, rel=1e-11)
    assert weights[: n - 1].max(initial=0.0) == 0.0
    denominator = comb(N, n)
    for i in sorted({n, (n + N) // 2, N - 3, N - 1, N}):
        exact = Fraction(comb(i - 1, n - 1), denominator)
        if exact > Fraction(1, 10**300):
            assert weights[i - 1] == pytest.approx(float(exact), rel=1e-11, abs=0)


def test_ties_do_not_depend_on_the_order_of_the_answers():
    """Brute force with random tie-breaking, in expectation."""
    selection = np.array([[1.0, 2.0, 2.0, 2.0, 0.0]])
    values = np.array([[5.0, 1.0, 4.0, 7.0, -3.0]])
    for n in range(1, 6):
        picks = []
        for subset in combinations(range(5), n):
            s = np.array(subset)
            tied = s[selection[0, s] == selection[0, s].max()]
            picks.append(values[0, tied].mean())
        for order in (np.arange(5), np.array([3, 0, 4, 2, 1])):
            result = bon_expected(selection[:, order], values[:, order], [n])
            assert result[0, 0] == pytest.approx(np.mean(picks), rel=1e-12)


def test_constant_selection_is_the_mean():
    values = np.random.default_rng(1).normal(size=(100, 9))
    expected = bon_expected(np.zeros((100, 9)), values, [1, 3, 9])
    np.testing.assert_allclose(expected, values.mean(1, keepdims=True) * np.ones((1, 3)), rtol=1e-12)


def test_many_prompts_are_the_same_as_one_by_one():
    rng = np.random.default_rng(2)
    selection, values = rng.integers(0, 5, size=(130, 20)).astype(float), rng.normal(size=(130, 20))
    together = bon_expected(selection, values, [1, 4, 20])
    alone = np.concatenate([bon_expected(selection[p : p + 1], values[p : p + 1], [1, 4, 20]) for p in range(130)])
    np.testing.assert_array_equal(together.round(12), alone.round(12))


def test_kl():
    assert bon_kl(1) == 0.0
    assert bon_kl([1, 2]).tolist() == pytest.approx([0.0, np.log(2) - 0.5])
    with pytest.raises(DataError, match="n >= 1"):
        bon_kl(0)


def test_errors():
    scores = np.zeros((2, 4))
    with pytest.raises(DataError, match="1 <= n <= 4 .* got n=5"):
        bon_expected(scores, scores, [5])
    with pytest.raises(DataError, match="one shape"):
        bon_expected(scores, scores[:, :3], [1])
    broken = scores.copy()
    broken[1, 2] = np.nan
    with pytest.raises(DataError, match="non-finite selection score for prompts \\[1\\]"):
        bon_expected(broken, scores, [1])
    with pytest.raises(DataError, match="non-finite value for prompts \\[1\\]"):
        bon_expected(scores, broken, [1])
