"""Best-of-n curves against brute force, and the analysis of their peaks."""

import itertools

import numpy as np
import pytest

from align.errors import DataError
from align.evaluation.best_of_n import bon_curve, joined_notes, n_grid
from align.evaluation.bootstrap import mean_interval, percentile_interval, resample_weights
from align.evaluation.peak import analyse_peak
from tests.evaluation.synthetic import scored_answers


def brute_force(selection, gold, n):
    """Mean over all subsets of size n of the gold score of the answer with the highest selection score."""
    picks = [max(subset, key=lambda i: selection[i]) for subset in itertools.combinations(range(len(selection)), n)]
    return np.mean([gold[i] for i in picks]), np.mean([selection[i] for i in picks])


def test_curve_equals_brute_force_with_ragged_prompts():
    rng = np.random.default_rng(1)
    selection = [rng.normal(size=size) for size in (7, 9, 7)]
    gold = [rng.normal(size=size) for size in (7, 9, 7)]
    curve = bon_curve(selection, gold, ns=[2, 3, 7])
    assert curve.n.tolist() == [1, 2, 3, 7]
    for row, n in enumerate(curve.n):
        for prompt in range(3):
            expected = brute_force(selection[prompt], gold[prompt], n)
            assert curve.per_prompt["gold"][row, prompt] == pytest.approx(expected[0])
            assert curve.per_prompt["proxy"][row, prompt] == pytest.approx(expected[1])
    np.testing.assert_allclose(curve.gold, curve.per_prompt["gold"].mean(1))
    assert curve.kl[0] == 0 and curve.kl[3] == pytest.approx(np.log(7) - 6 / 7)
    assert curve.gold_sd == pytest.approx(np.concatenate(gold).std())


def test_grid():
    assert n_grid(1) == [1]
    assert n_grid(32) == [1, 2, 4, 8, 16, 32]
    assert n_grid(31) == [1, 2, 4, 8, 16, 31]
    assert n_grid(33) == [1, 2, 4, 8, 16, 32]


def test_ragged_prompts_limit_n_and_say_so():
    scores = [np.arange(5.0), np.arange(9.0)]
    curve = bon_curve(scores, scores)
    assert curve.n[-1] == 5 and curve.answers == (5, 9)
    assert any("5 to 9 answers: n stops at 5" in note for note in curve.notes)
    wide = bon_curve(scores, scores, min_answers=9)
    assert wide.n[-1] == 8 or wide.n[-1] == 9
    assert any("1 of 2 prompts left out" in note for note in wide.notes)
    with pytest.raises(DataError, match="n=8 needs as many answers for every prompt, and 1 of 2 prompts have fewer"):
        bon_curve(scores, scores, ns=[8])
    with pytest.raises(DataError, match="no prompt has at least 10 answers"):
        bon_curve(scores, scores, min_answers=10)


def test_one_answer_or_misaligned_scores_are_refused():
    with pytest.raises(DataError, match="a prompt has a single answer"):
        bon_curve([np.arange(3.0), np.arange(1.0)], [np.arange(3.0), np.arange(1.0)])
    with pytest.raises(DataError, match="same answers"):
        bon_curve([np.arange(3.0)], [np.arange(4.0)])


def test_ties_are_said_and_do_not_depend_on_order():
    selection, gold = np.array([0.0, 1.0, 1.0, 1.0]), np.array([0.0, 3.0, 1.0, 2.0])
    one, other = (bon_curve([selection[order]], [gold[order]]) for order in ([0, 1, 2, 3], [3, 2, 0, 1]))
    np.testing.assert_allclose(one.gold, other.gold)
    assert one.gold[-1] == pytest.approx(2.0) and any("75 % of the answers tie" in note for note in one.notes)


def test_few_ties_are_not_0_percent():
    scores = np.random.default_rng(0).normal(size=(2, 500))
    scores[0, 1] = scores[0, 0]
    (note,) = bon_curve(scores, scores).notes
    assert note.startswith("under 1 % of the answers tie")


def test_a_note_names_the_curves_that_it_is_about():
    gold, short = [np.arange(4.0), np.arange(5.0)], "prompts have 4 to 5 answers: n stops at 4"
    selections = {"a": [np.array([0.0, 1.0, 1.0, 2.0]), np.arange(5.0)], "b": gold, "c": gold}
    first, second = joined_notes({name: bon_curve(scores, gold) for name, scores in selections.items()})
    assert first.startswith(short) and second.startswith("a: 22 % of the answers tie")


def test_bootstrap_of_a_mean_covers_it():
    misses = 0
    for trial in range(200):
        values = np.random.default_rng(trial).exponential(size=(60, 1))
        low, high = mean_interval(values, seed=trial)
        misses += not low[0] <= 1.0 <= high[0]
    assert 4 <= misses <= 24  # 5 % of 200 is 10


def test_bootstrap_weights_are_means_over_prompts_and_seeded():
    weights = resample_weights(7, resamples=50, seed=3)
    np.testing.assert_allclose(weights.sum(1), 1)
    np.testing.assert_array_equal(weights, resample_weights(7, resamples=50, seed=3))
    assert not np.array_equal(weights, resample_weights(7, resamples=50, seed=4))
    low, high = percentile_interval(np.array([1.0, 2.0, np.inf, np.inf]))
    assert (low, high) == (1.0, np.inf)


def test_a_trap_is_found_and_an_honest_proxy_is_not_accused():
    trapped = bon_curve(*scored_answers())
    peak = analyse_peak(trapped.per_prompt["proxy"], trapped.per_prompt["gold"])
    assert peak.verdict == "over-optimised" and 0 < peak.peak < peak.end
    assert peak.drop == pytest.approx(trapped.gold.max() - trapped.gold[-1])
    assert peak.drop_share == pytest.approx(peak.drop / (trapped.gold.max() - trapped.gold[0]))
    assert peak.drop_interval[0] > 0 and peak.proxy_change > 0
    honest = bon_curve(*scored_answers(trap=0.0))
    assert analyse_peak(honest.per_prompt["proxy"], honest.per_prompt["gold"]).verdict == "not over-optimised"


def test_a_noisy_plateau_is_seldom_called_a_fall():
    """The highest of many noisy points is above the last one by luck; the verdict must not count luck."""
    wrong = naive = 0
    for trial in range(100):
        rng = np.random.default_rng(trial)
        gold = np.concatenate([[0], np.ones(20)])[:, None] + rng.normal(size=(21, 40))
        proxy = np.arange(21.0)[:, None] + rng.normal(size=(21, 40))
        peak = analyse_peak(proxy, gold)
        wrong += peak.verdict == "over-optimised"
        difference = gold[peak.peak] - gold[-1]
        naive += difference.mean() > 1.96 * difference.std() / np.sqrt(40)
    assert wrong <= 8 and naive >= 15


def test_a_fall_that_chance_could_make_is_unclear():
    rng = np.random.default_rng(0)
    noise = 3 * rng.normal(size=(3, 20))
    gold = np.array([0.0, 1.0, 0.7])[:, None] + noise - noise.mean(1, keepdims=True)
    peak = analyse_peak(np.arange(3.0)[:, None] + np.zeros((3, 20)), gold)
    assert peak.peak == 1 and peak.drop_share > 0.1 and peak.drop_interval[0] <= 0
    assert peak.verdict == "unclear"


def test_collapse_and_falls_without_a_gain():
    rng = np.random.default_rng(0)
    gold = np.array([0.0, 2.0, 1.0])[:, None] + 0.1 * rng.normal(size=(3, 30))
    assert (
        analyse_peak(np.array([0.0, 2.0, 1.0])[:, None] + 0.1 * rng.normal(size=(3, 30)), gold).verdict == "collapsed"
    )
    from_start = analyse_peak(np.arange(3.0)[:, None] + np.zeros((3, 30)), -np.arange(3.0)[:, None] + np.zeros((3, 30)))
    assert from_start.verdict == "never helped" and from_start.drop_share is None and from_start.gain == 0
    assert analyse_peak(np.ones((1, 30)), np.ones((1, 30))).verdict == "too little data"
