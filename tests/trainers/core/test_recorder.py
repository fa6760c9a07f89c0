"""Metrics are weighted means between logs; a phase within another is counted once."""

import time

import pytest

from align.errors import RewardError
from align.trainers.core.recorder import Recorder


def test_weighted_means_start_anew_at_each_log():
    recorder = Recorder()
    recorder.record("kl", 1.0, 3)
    recorder.record("kl", 5.0)
    recorder.record("nothing", 2.0, 0)
    assert recorder.take() == {"kl": 2.0}
    recorder.record("kl", 7.0)
    assert recorder.take() == {"kl": 7.0}


def test_the_spread_is_the_deviation_of_all_values():
    recorder = Recorder()
    for value in (1.0, 1.0, 4.0):
        recorder.record_spread("rewards/polite", value)
    assert recorder.take() == {"rewards/polite/mean": 2.0, "rewards/polite/std": pytest.approx(2**0.5)}


def test_a_phase_within_another_is_counted_there_only():
    recorder = Recorder()
    with recorder.phase("outer"):
        time.sleep(0.01)
        with recorder.phase("inner"):
            time.sleep(0.05)
    taken = recorder.take()
    assert taken["time/inner"] >= 0.05 and 0.01 <= taken["time/outer"] < taken["time/inner"]


def test_a_phase_that_fails_is_counted():
    recorder = Recorder()
    with pytest.raises(ZeroDivisionError), recorder.phase("outer"):
        1 / 0  # noqa: B018
    assert set(recorder.take()) == {"time/outer"}


def test_a_metric_of_the_users_has_its_own_name_and_no_other():
    recorder = Recorder()
    recorder.record_given("accuracy", 1.0)
    recorder.record_given("accuracy", 0.0)
    recorder.record("kl", 2.0)
    assert recorder.take({"loss": 0.1}) == {"kl": 2.0, "accuracy": 0.5}
    assert recorder.take() == {}
    for name in ("kl", "loss", "epoch"):
        recorder = Recorder()
        recorder.record("kl", 2.0)
        recorder.record_given(name, 1.0)
        with pytest.raises(RewardError, match=f"log_metric\\('{name}', ...\\)"):
            recorder.take({"loss": 0.1})
