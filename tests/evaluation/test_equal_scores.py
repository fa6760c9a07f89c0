"""Scores that are all equal: 0.1, of which numpy makes a mean that is another number in the last digit."""

import numpy as np
import pytest

from align.cli.bon import ensemble_scores
from align.errors import ConfigError, DataError
from align.evaluation.best_of_n import bon_curve
from align.evaluation.interactive import proxy_and_gold
from align.evaluation.peak import analyse_peak
from align.evaluation.preference_metrics import pearson
from align.evaluation.proxy_points import find_proxy_point
from align.evaluation.records import EvalWriter, read_run
from align.evaluation.report import sentence
from align.evaluation.rounding import deviation, first_highest
from align.evaluation.score_table import read_score_table
from align.evaluation.summary import build_summary

SAME = np.full(30, 0.1)


def test_numpys_deviation_of_equal_scores_is_not_zero():
    assert SAME.std() > 0 and deviation(SAME) == 0
    assert deviation(np.array([1.0, 2.0])) == 0.5
    assert deviation(np.array([1e-200, 2e-200])) == 0.5e-200 and deviation(np.array([0.0, 1e200])) == 0.5e200
    assert first_highest(np.array([[0.3, 0.1 + 0.2, 0.2], [0.0, 1.0, 1.0]]), 1e-12).tolist() == [0, 1]


@pytest.mark.parametrize("score", [0.0, 0.1, -0.7])
def test_a_proxy_that_tells_nothing_apart_optimises_nothing(score):
    gold = np.random.default_rng(0).normal(size=(40, 8))
    curve = bon_curve(np.full(gold.shape, score), gold)
    peak = analyse_peak(curve.per_prompt["proxy"], curve.per_prompt["gold"])
    assert (peak.peak, peak.gain, peak.drop, peak.verdict) == (0, 0.0, 0.0, "not optimised")
    assert curve.proxy_sd == 0


def test_a_page_draws_equal_scores_as_a_line(tmp_path):
    """Not as a band 1e-16 wide that fills the figure, nor as a gold score that fell from 0.1 to 0.1."""
    writer = EvalWriter(tmp_path, name="r", method="m", proxy="rm", gold="checker", seed=0, config={})
    for step in range(4):
        writer.write(step, kl=SAME * step, kl_k3=SAME * step, proxy=SAME, gold=SAME, length=SAME)
    gold = np.random.default_rng(0).normal(size=(30, 8))
    curve = bon_curve(np.full(gold.shape, 0.1), gold)
    summary = build_summary(runs={"r": read_run(tmp_path)}, best_of_n={"c": curve})
    run = summary["runs"]["r"]
    for score in ("gold", "proxy"):
        assert run[f"{score}_low"] == run[f"{score}_high"] == run[score]
    scaled = [c for kind in ("runs", "best_of_n") for c in proxy_and_gold(summary[kind])[0]["curves"]]
    for drawn in (scaled[0], scaled[1], scaled[3]):
        assert {*drawn["y"], *drawn["low"], *drawn["high"]} == {0.0}
    assert sentence(run, "runs").startswith(
        "The gold score is 0.100 at the start and at the end, and was never higher."
    )


def test_equal_peaks_are_the_first_of_them_also_in_resamples():
    rng = np.random.default_rng(0)
    noise, level = 0.1 * rng.normal(size=(9, 60)), rng.normal(size=60)
    gold = level + np.array([0, 2, 2, 2, 2, 2, 2, 2, 0.5])[:, None] + noise
    gold[1:8] = gold[1]
    gold[2:8] += 1e-15 * rng.random((6, 60))  # what another order of the same sum makes of it
    peak = analyse_peak(np.arange(9.0)[:, None] + noise, gold)
    assert (peak.verdict, peak.peak, peak.trusted) == ("over-optimised", 1, 1)


def test_a_start_without_spread_is_no_unit(tmp_path):
    writer = EvalWriter(tmp_path, name="r", method="m", proxy="rm", gold="checker", seed=0, config={})
    for step in range(5):
        scores = SAME + step * np.linspace(0, 1, 30)
        writer.write(step, kl=SAME * step, kl_k3=SAME * step, proxy=scores, gold=scores, length=SAME)
    summary = build_summary(runs={"r": read_run(tmp_path)})
    assert summary["runs"]["r"]["unit"]["proxy_sd"] == summary["runs"]["r"]["unit"]["gold_sd"] == 0
    assert summary["fits"]["runs"] == {}


def test_no_correlation_with_equal_scores():
    lengths = np.arange(30.0)
    assert pearson(SAME, lengths) is None and pearson(lengths, SAME) is None
    assert pearson(lengths, 0.1 * lengths) == pytest.approx(1)


def test_equal_scores_are_refused_where_they_decide(tmp_path):
    with pytest.raises(ConfigError, match="proxy number 2 has one score for all answers"):
        ensemble_scores([np.arange(30.0), SAME], "wco")
    with pytest.raises(DataError, match="the gold score gold is 0.1 for every answer"):
        bon_curve(np.arange(30.0).reshape(3, 10), SAME.reshape(3, 10))
    table = tmp_path / "t.csv"
    table.write_text("prompt_id,rm,gold\n" + "".join(f"{i // 6},{i},0.1\n" for i in range(30)))
    with pytest.raises(DataError, match="'gold' is 0.1 in every row"):
        read_score_table(table, proxies=["rm"], gold="gold")


def test_a_gold_score_that_never_changes_has_no_proxy_point(tmp_path):
    writer = EvalWriter(tmp_path, name="r", method="m", proxy="rm", gold="checker", seed=0, config={})
    rng = np.random.default_rng(0)
    for step in range(20):
        columns = {"rewards/a": rng.normal(size=30) + step}
        writer.write(step, kl=SAME, kl_k3=SAME, proxy=SAME, gold=rng.permutation(SAME), length=SAME, **columns)
    with pytest.raises(DataError, match="gold never changed"):
        find_proxy_point([read_run(tmp_path)])
