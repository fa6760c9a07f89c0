"""Verdicts on hand-made points, the axis of their figures, and the proxy of constrained runs."""

import numpy as np
import pytest

from align.evaluation import report
from align.evaluation.peak import MIN_PROMPTS, analyse_peak
from align.evaluation.records import EvalWriter, read_run
from align.evaluation.summary import build_summary

NOISE = 0.1 * np.random.default_rng(0).normal(size=(5, 40))


def points(*means, prompts=40) -> np.ndarray:
    return np.array(means, dtype=float)[:, None] + NOISE[: len(means), :prompts]


RISING = points(0, 1, 2, 3, 4)


@pytest.mark.parametrize(
    ("proxy", "gold", "verdict", "trusted"),
    [
        (RISING, points(0, 1, 2, 1, 0.5), "over-optimised", 2),
        (RISING, points(0, 1, 2, 3, 4), "not over-optimised", 4),
        (RISING, points(2, 1, 0.5, 0.4, 0.2), "never helped", 0),
        (points(0, 1, 2, 1, 0), points(0, 1, 2, 1, 0), "collapsed", None),
        (points(4, 3, 2, 1, 0), points(0, 1, 2, 3, 4), "not optimised", None),  # the proxy fell: nothing to judge
        (RISING, points(0, 0, 0, 0, 0), "unclear", None),
    ],
)
def test_by_the_points(proxy, gold, verdict, trusted):
    peak = analyse_peak(proxy, gold)
    assert (peak.verdict, peak.trusted) == (verdict, trusted)


def test_the_interval_of_the_proxys_change_is_of_the_peak_shown():
    """On a plateau of gold other prompts find other peaks, from which the proxy rises by more."""
    noise = 0.3 * np.random.default_rng(0).normal(size=(5, 200))
    proxy = np.array([0.0, 1.0, 2.0, 3.0, 3.1])[:, None] + 0.01 * noise
    peak = analyse_peak(proxy, np.array([0.0, 2.0, 2.0, 2.0, 0.5])[:, None] + noise)
    assert peak.verdict == "over-optimised"
    low, high = peak.proxy_change_interval
    assert low < peak.proxy_change < high


def test_few_prompts_are_a_verdict_of_their_own():
    few = MIN_PROMPTS - 1
    peak = analyse_peak(RISING[:, :few], points(0, 1, 2, 1, 0, prompts=few))
    assert peak.verdict == "too few prompts" and peak.trusted is None
    assert analyse_peak(RISING[:, : few + 1], points(0, 1, 2, 1, 0, prompts=few + 1)).verdict == "over-optimised"


def test_one_prompt_that_carries_the_fall_is_not_a_fall():
    gold = points(0, 1, 2, 2, 2)
    gold[4, 7] -= 60  # falls by 60 on one prompt of 40, by nothing on the others
    assert analyse_peak(RISING, gold).drop_share > 0.5 and analyse_peak(RISING, gold).verdict == "unclear"
    gold = points(0, 0.05, 0.1, 0.1, 0.054)  # all fall, by no more than chance
    assert analyse_peak(RISING, gold).verdict == "unclear"
    rest = np.random.default_rng(1).normal(size=39)
    falls = 0.031 + 0.1 * (rest - rest.mean()) / rest.std()  # by no more than chance; with one more prompt by more
    gold = np.stack([np.full(40, -0.2), np.zeros(40), -np.append(falls, 0.3)])
    found = analyse_peak(RISING[:3], gold)
    assert found.drop_interval[0] > 0 and found.verdict == "unclear"


def test_a_late_peak_that_resamples_move_is_trusted_only_to_the_earliest():
    gold = points(0, 2, 2.01, 0, 0)
    peak = analyse_peak(RISING, gold)
    assert peak.verdict == "over-optimised" and (peak.trusted, int(gold.mean(1).argmax())) == (1, peak.peak)


def write(folder, kl, kl_k3, config=None, **rewards):
    writer = EvalWriter(
        folder, name="run", method="ppo", proxy="sum", gold="gold", seed=0, config=config or {}
    )  # fmt: skip
    for step in range(4):
        columns = {f"rewards/{name}": np.full(30, values[step]) for name, values in rewards.items()}
        proxy = sum(columns.values()) if columns else np.full(30, float(step))
        writer.write(
            step, kl=np.full(30, kl[step]), kl_k3=np.full(30, kl_k3[step]), proxy=proxy, gold=np.full(30, 1.0 + step),
            length=np.ones(30), **columns,
        )  # fmt: skip
    return read_run(folder)


@pytest.mark.parametrize(
    ("kl", "kl_k3", "axis"),
    [
        ([0, 1, 2, 3], [0, 1, 2, 3], "kl"),
        ([0, -0.1, 2, 3], [0, 0.1, 2, 3], "kl_k3"),
        ([0, 0, 0, 0], [0, 0.1, 0.2, 0.3], "kl_k3"),
        ([0, 0, 0, 0], [0, 0, 0, 0.3], "step"),
    ],
)
def test_curves_do_not_collapse_to_a_line(kl, kl_k3, axis, tmp_path):
    run = write(tmp_path / "run", kl, kl_k3)
    summary = build_summary(runs={"run": run})
    entry = summary["runs"]["run"]
    assert entry["x_of"] == axis and entry["x"] == [float(x) for x in getattr(run, axis)]
    assert len(set(entry["x"])) == 4 and entry["kl"] == pytest.approx(kl)
    assert any("at or below 0" in note for note in entry["notes"]) == (axis != "kl")
    path = report.write_report(tmp_path / "r.html", title="t", intro="i", summary=summary)
    assert "trusted up to step 3" in path.read_text()


HELD = [{"reward": "length", "above": 5}]


def test_a_constrained_run_shows_the_reward_of_its_task(tmp_path):
    helpful, length = [-4, -3, -2.5, -2.3], [8, 10, 12, 16]
    run = write(tmp_path, [0, 1, 2, 3], [0, 1, 2, 3], {"constraints": HELD}, helpful=helpful, length=length)
    entry = build_summary(runs={"run": run})["runs"]["run"]
    assert run.proxy[-1] == pytest.approx(13.7) and entry["proxy"] == pytest.approx(helpful)
    assert entry["proxy_name"] == "helpful" and any("without length" in note for note in entry["notes"])


def test_weights_and_named_tasks_of_a_constrained_run(tmp_path):
    rewards = {"length": [1, 2, 3, 4], "b": [1, 1, 1, 2], "a": [0, 0, 0, 1]}
    config = {"constraints": HELD, "task_rewards": ["length", "a"], "reward_weights": [0.5, 7, 2]}
    run = write(tmp_path / "a", [0, 1, 2, 3], [0, 1, 2, 3], config, **rewards)
    entry = build_summary(runs={"run": run})["runs"]["run"]
    assert entry["proxy"] == pytest.approx([0.5, 1, 1.5, 4]) and entry["proxy_name"] == "0.5 length + 2 a"
    alone = write(tmp_path / "b", [0, 1, 2, 3], [0, 1, 2, 3], {"constraints": HELD}, length=[1, 2, 3, 4])
    entry = build_summary(runs={"run": alone})["runs"]["run"]
    assert entry["proxy"] == [1, 2, 3, 4] and any("KL alone" in note for note in entry["notes"])
