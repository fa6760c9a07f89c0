"""Every number about preference pairs, against a loop that does it the long way."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest

from align.evaluation import preference_metrics as metrics

NAN = math.nan


def draw(n=40, k=3, seed=0):
    return np.random.default_rng(seed).normal(size=(k, n)).round(1)  # rounded: there are ties


def test_what_a_tie_counts():
    margins = np.array([2.0, -1.0, 0.0, NAN])
    assert metrics.correct(margins)[:3].tolist() == [1.0, 0.0, 0.5] and np.isnan(metrics.correct(margins)[3])
    assert metrics.won(margins)[:3].tolist() == [1.0, 0.0, 0.0] and np.isnan(metrics.won(margins)[3])


# ---- bootstrap ------------------------------------------------------------------------------------------------------


def test_pairs_of_one_prompt_are_drawn_together():
    values = np.array([1.0, 1.0, 1.0, 0.0])
    together = metrics.bootstrap_means({"x": values}, ["a", "a", "a", "b"])["x"]
    # of two prompts drawn with replacement: twice a, twice b, or one of each
    assert set(np.unique(together).round(6)) == {0.0, 0.75, 1.0}
    assert np.mean(together == 0.75) == pytest.approx(0.5, abs=0.05)
    apart = metrics.bootstrap_means({"x": values}, [0, 1, 2, 3])["x"]
    assert {0.25, 0.5} <= set(np.unique(apart))


def test_draws_against_the_exact_distribution():
    values, groups = np.array([0.0, 1.0, 5.0, NAN]), ["a", "b", "b", "c"]
    exact = []
    for drawn in itertools.product("abc", repeat=3):
        entries = [v for g in drawn for v, label in zip(values, groups, strict=True) if label == g and not np.isnan(v)]
        exact.append(np.mean(entries) if entries else NAN)
    samples = metrics.bootstrap_means({"x": values}, groups, resamples=20_000)["x"]
    assert np.isnan(samples).mean() == pytest.approx(np.isnan(exact).mean(), abs=0.01)
    for value in set(np.round(exact, 6)) - {NAN}:
        if not np.isnan(value):
            assert np.isclose(samples, value).mean() == pytest.approx(np.isclose(exact, value).mean(), abs=0.015)


def test_columns_see_the_same_draws_and_blocks_change_nothing_but_the_draws(monkeypatch):
    values = draw()[0]
    samples = metrics.bootstrap_means({"a": values, "b": 2 * values + 1}, range(40))
    assert samples["b"] == pytest.approx(2 * samples["a"] + 1)
    assert metrics.bootstrap_means({"a": values}, range(40))["a"] == pytest.approx(samples["a"])
    monkeypatch.setattr(metrics, "BLOCK", 40 * 7)
    blocks = metrics.bootstrap_means({"a": values}, range(40))["a"]
    assert blocks.shape == (1000,) and len(np.unique(blocks)) > 400  # not one block repeated
    assert metrics.interval(blocks) == pytest.approx(metrics.interval(samples["a"]), abs=0.1)


def test_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(5)
    hits = 0
    for seed in range(200):
        values = (rng.random(80) < 0.7).astype(float)
        low, high = metrics.interval(metrics.bootstrap_means({"x": values}, range(80), seed=seed)["x"])
        hits += low <= 0.7 <= high
    assert 0.90 <= hits / 200 <= 0.99


def test_estimates():
    values = np.array([1.0, 0.0, NAN, 1.0])
    found = metrics.estimate(values, np.array([0.5, 0.6, 0.7]))
    assert found["value"] == pytest.approx(2 / 3) and found["pairs"] == 3 and 0.5 <= found["low"] < found["high"] <= 0.7
    nothing = {"value": None, "low": None, "high": None, "pairs": 0}
    assert metrics.estimate(np.array([NAN, NAN]), np.array([NAN, NAN])) == nothing
    assert metrics.interval(np.array([NAN, NAN, 1.0])) == (None, None)


# ---- length ---------------------------------------------------------------------------------------------------------


def test_a_share_of_all_is_not_certain():
    """All of 20 right had the interval [1, 1], which missed a true share of 95 % in 36 % of evaluations."""
    right, prompts = np.ones(20), [f"p{i // 2}" for i in range(20)]  # two pairs of each prompt
    samples = metrics.bootstrap_means({"a": right}, prompts)["a"]
    of_all = metrics.estimate(right, samples, prompts)
    of_none = metrics.estimate(1 - right, 1 - samples, prompts)
    assert (of_all["value"], of_all["high"], of_none["low"]) == (1, 1, 0)
    assert of_all["low"] == pytest.approx(0.025 ** (1 / 10)) and of_none["high"] == pytest.approx(1 - 0.025 ** (1 / 10))
    assert metrics.estimate(right, samples)["low"] == 1  # no share
    missed, count, chances = 0.0, 20, np.random.default_rng(0).binomial(20, 0.95, size=150)
    for k in chances:
        outcome = (np.arange(count) < k).astype(float)
        found = metrics.estimate(
            outcome, metrics.bootstrap_means({"a": outcome}, range(count), resamples=200)["a"], range(count)
        )
        missed += not found["low"] <= 0.95 <= found["high"]
    assert missed <= 0.05 * len(chances)


def test_length_bins():
    chosen = np.array([49, 50, 90, 91, 100, 109, 111, 199, 200, 500, 5])
    expected = [0, 1, 1, 2, 2, 2, 3, 3, 4, 4]
    assert metrics.length_bin(chosen[:10], np.full(10, 100)).tolist() == expected
    assert metrics.length_bin(np.array([5]), np.array([0])).tolist() == [4]
    assert len(metrics.LENGTH_BINS) == len(metrics.LENGTH_RATIOS) + 1


def test_length_bias_against_loops():
    rng = np.random.default_rng(2)
    lengths = rng.integers(1, 9, size=(2, 60)).astype(float)
    scores = (0.3 * lengths + rng.normal(size=lengths.shape)).round(1)
    found = metrics.length_bias(*scores, *lengths)
    longer, labels = [], []
    for (sc, sr), (lc, lr) in zip(scores.T, lengths.T, strict=True):
        if lc != lr:
            long_score, short_score = (sc, sr) if lc > lr else (sr, sc)
            longer.append(1.0 if long_score > short_score else 0.5 if long_score == short_score else 0.0)
            labels.append(lc > lr)
    assert found["prefers_longer"] == pytest.approx(np.mean(longer))
    assert found["longer_is_chosen"] == pytest.approx(np.mean(labels))
    assert found["pearson"] == pytest.approx(np.corrcoef(scores.ravel(), lengths.ravel())[0, 1])
    swapped = metrics.length_bias(*scores[::-1], *lengths[::-1])
    assert swapped["within_pair"] == pytest.approx(found["within_pair"])
    both = [np.concatenate([a - b, b - a]) for a, b in (scores, lengths)]  # either answer first
    assert found["within_pair"] == pytest.approx(np.corrcoef(*both)[0, 1])


def test_a_pure_length_reward_is_found_out_and_a_constant_one_has_no_correlation():
    lengths = np.array([[10.0, 5.0, 7.0], [3.0, 8.0, 7.0]])
    found = metrics.length_bias(*lengths, *lengths)
    assert found == {"pearson": 1, "spearman": 1, "within_pair": 1, "prefers_longer": 1.0, "longer_is_chosen": 0.5}
    constant = metrics.length_bias(np.ones(3), np.ones(3), *lengths)
    assert constant["pearson"] is None and constant["within_pair"] is None and constant["prefers_longer"] == 0.5
    equal = metrics.length_bias(*lengths, np.ones(3), np.ones(3))
    assert equal["prefers_longer"] is None and equal["longer_is_chosen"] is None


# ---- agreement ------------------------------------------------------------------------------------------------------


def test_agreement_against_a_loop():
    margins = draw()
    expected = np.zeros((3, 3))
    for i, j in itertools.product(range(3), repeat=2):
        for a, b in zip(margins[i], margins[j], strict=True):
            same = (a > 0) == (b > 0) and (a < 0) == (b < 0)
            expected[i, j] += 1.0 if same else 0.5 if a == 0 or b == 0 else 0.0
    assert metrics.agreement(margins) == pytest.approx(expected / 40)
    assert np.diag(metrics.agreement(margins)) == pytest.approx(1.0)


def test_consensus_by_hand():
    margins = np.array([[1, 1, -1, -1, 0], [1, -1, -1, -1, 1]], dtype=float)
    assert metrics.consensus(margins) == pytest.approx(
        {"all_right": 0.2, "all_wrong": 0.4, "split": 0.4, "all_wrong_if_independent": 2 / 5 * 3 / 5}
    )


def test_disagreement_that_warns_and_that_does_not():
    rng = np.random.default_rng(3)
    hard = rng.random(4000) < 0.5
    truth = np.ones(4000)
    members = truth + np.where(hard, 3.0, 0.1) * rng.normal(size=(5, 4000))
    outcome = metrics.correct(members.mean(0))
    found = metrics.disagreement(members, outcome)
    accuracies = [part["accuracy"] for part in found["bins"]]
    assert found["auroc"] > 0.7 and accuracies[0] == 1.0 > accuracies[3]
    assert [part["pairs"] for part in found["bins"]] == [1000] * 4
    assert found["auroc_relative"] > found["auroc"]
    blind = metrics.disagreement(rng.normal(size=(5, 4000)) + 1, (rng.random(4000) < 0.7).astype(float))
    assert blind["auroc"] == pytest.approx(0.5, abs=0.03)
    assert metrics.disagreement(members, np.ones(4000))["auroc"] is None


def test_warnings_by_hand():
    """Two members of root mean square 1: the wrong pair varies least, but most for its small margin."""
    margins = np.array([[1.5, 0.5, -0.2, -0.8], [0.5, 1.5, 0.0, 0.8]]) * np.sqrt(2)
    margins *= np.sqrt(4 / (margins**2).sum(1, keepdims=True))
    found = metrics.disagreement(margins, np.array([1.0, 1.0, 0.0, 0.5]))
    assert found["auroc"] == 0 and found["auroc_relative"] == 1 and found["auroc_margin"] == 1
    assert [part["accuracy"] for part in found["bins"]] == [0, 1, 1, 0.5]


def test_disagreement_does_not_depend_on_the_members_scales():
    margins = draw(seed=4)
    outcome = metrics.correct(margins.mean(0))
    scaled = margins * np.array([[1.0], [100.0], [0.01]])
    one, other = (metrics.disagreement(m, outcome) for m in (margins, scaled))
    for name in ("auroc", "auroc_relative", "auroc_margin"):
        assert one[name] == pytest.approx(other[name])
    assert metrics.disagreement(np.zeros((2, 8)), np.full(8, 0.5))["bins"][0]["variance"] == 0


# ---- ranks ----------------------------------------------------------------------------------------------------------


def test_ranks_and_correlations_against_pandas():
    frame = pd.DataFrame(draw().T)
    a, b, _ = draw()
    assert metrics.ranks(a) == pytest.approx(frame[0].rank())
    spearman = frame.corr("spearman")
    assert metrics.pearson(metrics.ranks(a), metrics.ranks(b)) == pytest.approx(spearman[0][1])
    assert np.array(metrics.correlations(draw())) == pytest.approx(frame.corr().to_numpy())


def test_auroc_against_a_loop():
    a, b = np.array([1.0, 2.0, 2.0]), np.array([0.0, 2.0, 3.0, 1.0])
    wins = [1.0 if x > y else 0.5 if x == y else 0.0 for x in a for y in b]
    assert metrics.auroc(a, b) == pytest.approx(np.mean(wins))
    assert metrics.auroc(a, np.array([])) is None


# ---- soft labels ----------------------------------------------------------------------------------------------------


def test_soft_labels_count_as_the_labels_drawn_from_them_do():
    margins, labels = np.array([1.0, -1.0, 0.0, -2.0]), np.array([0.9, 0.6, 0.8, 0.2])
    assert metrics.correct(margins, labels) == pytest.approx([0.9, 0.4, 0.5, 0.8])
    assert metrics.won(margins, labels) == pytest.approx([0.9, 0.4, 0.0, 0.8])
    rng = np.random.default_rng(0)
    drawn = np.where(rng.random((20_000, 4)) < labels, 1.0, -1.0)  # -1: the answers change places
    assert metrics.correct(drawn * margins).mean(0) == pytest.approx(metrics.correct(margins, labels), abs=0.01)
    lengths = np.array([[5.0, 5.0, 2.0, 1.0], [4.0, 5.0, 3.0, 2.0]])
    found = metrics.length_bias(margins, np.zeros(4), *lengths, labels)
    assert found["longer_is_chosen"] == pytest.approx((0.9 + 0.2 + 0.8) / 3)
