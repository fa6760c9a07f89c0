"""Rewards that fail or do not return, and what becomes of their completions."""

import asyncio
import logging
import re
import threading
import time

import pytest
import torch

from align.errors import ConfigError, RewardError
from align.modeling.fingerprint import fingerprint
from align.reward_models.base import RewardBatch
from align.reward_models.build import build_reward
from align.reward_models.composite import CompositeReward
from align.reward_models.failures import Failed, Failures
from align.reward_models.rules import RuleReward
from align.reward_models.verifier import VerifierReward

BATCH = RewardBatch(["p"] * 4, ["a", "bad", "ccc", "d"], rows=[7, 8, 9, 10])


def fails_on_bad(completion):
    if completion == "bad":
        raise ValueError("not today")
    return completion == "a"


def stubborn(completions):
    """Catches whatever it can."""
    while True:
        try:
            time.sleep(60)
        except Exception:
            pass


def backtracking(completions):
    return [float(bool(re.match("(a+)+$", "a" * 60 + "b"))) for _ in completions]


@pytest.mark.parametrize("function", [lambda completions: time.sleep(60), stubborn, backtracking])
def test_a_function_that_does_not_return_ends_the_run_with_a_sentence(function):
    start = time.monotonic()
    with pytest.raises(RewardError, match="did not return within 0.2 s for rows .*raise timeout.*on_error"):
        RuleReward(function, name="slow", timeout=0.2).score(BATCH)
    assert time.monotonic() - start < 5
    # the deadline of one call is not that of the next
    assert RuleReward(lambda completions: [time.sleep(0.3) or 1.0] * 4, timeout=30).score(BATCH).scores.sum() == 4


def test_deadlines_outside_the_main_thread_and_of_async_functions():
    async def waits(completions):
        await asyncio.sleep(60)

    async def blocks(completions):
        time.sleep(3)

    found = []

    def score(function):
        try:
            RuleReward(function, timeout=0.2).score(BATCH)
        except RewardError as error:
            found.append(str(error))

    thread = threading.Thread(target=score, args=(lambda completions: time.sleep(3),))
    thread.start()
    thread.join(5)
    score(waits)
    assert len(found) == 2 and all("did not return within 0.2 s" in text for text in found)
    reward = RuleReward(blocks, timeout=0.2)
    reward.calls.timeout = -9.5  # 0.5 s for all calls together
    with pytest.raises(RewardError, match="it blocks the event loop"):
        reward.score(BATCH)

    async def cancels(completions):
        raise asyncio.CancelledError

    with pytest.raises(RewardError, match="failed with CancelledError|wanted to|CancelledError"):
        RuleReward(cancels).score(BATCH)

    async def fine(completions):
        return [1.0] * len(completions)

    assert RuleReward(fine).score(BATCH).scores.sum() == 4  # on a new loop


def test_a_function_that_uses_signals_itself_works_in_the_main_thread():
    import signal

    def alarmed(completions):
        signal.signal(signal.SIGALRM, lambda *_: None)
        signal.alarm(1)
        signal.alarm(0)
        return [1.0] * len(completions)

    before = signal.getsignal(signal.SIGUSR2)
    assert RuleReward(alarmed).score(BATCH).scores.sum() == 4
    assert signal.getsignal(signal.SIGUSR2) is before


@pytest.mark.parametrize("concurrency", [None, 3])
def test_mask_and_score(concurrency, caplog):
    options = {"on_error": "mask", "concurrency": concurrency}
    output = VerifierReward(fails_on_bad, **options).score(BATCH, partial=True)
    assert output.failed.tolist() == [False, True, False, False] and output.absent is None
    assert output.scores.nan_to_num(-5).tolist() == [1.0, -5.0, 0.0, 0.0]
    assert output.extras["failed"].tolist() == [0.0, 1.0, 0.0, 0.0]
    assert "row 1 of the batch (row 8 of the dataset)" in caplog.text and "ValueError: not today" in caplog.text
    with pytest.raises(RewardError, match="no score for rows \\[1\\] .*failed there, and here every"):
        VerifierReward(fails_on_bad, **options).score(BATCH)
    scored = VerifierReward(fails_on_bad, on_error="score", error_score=-2.0).score(BATCH)
    assert scored.scores.tolist() == [1.0, -2.0, 0.0, 0.0] and scored.failed is None
    rule = RuleReward(lambda completions: [float("nan"), "x", None, 1.0], on_error="mask").score(BATCH, partial=True)
    assert rule.failed.tolist() == [True, True, False, False] and rule.absent.tolist() == [False, False, True, False]
    parts = RuleReward(lambda completions: [len(completions[0])] if completions != ["bad"] else 1 / 0, batch_size=1,
                       on_error="score", error_score=0.0, concurrency=concurrency)  # fmt: skip
    assert parts.score(BATCH).scores.tolist() == [1.0, 0.0, 3.0, 1.0]


def test_the_share_of_failures_is_capped():
    seen = []

    def broken(completion):
        seen.append(completion)
        raise SystemExit(0)

    many = RewardBatch(["p"] * 400, ["a"] * 400)
    with pytest.raises(RewardError, match="failed for 11 of the last 11 .* 0.1 allows 10. The last: .*SystemExit"):
        VerifierReward(broken, on_error="mask").score(many)
    assert len(seen) == 11  # it does not wait for the rest
    failures, half = Failures("x", "mask", max_error_share=0.5), [0.0, Failed("y")] * 50
    for _ in range(30):
        failures.count(half, range(100), many)
    with pytest.raises(RewardError, match="502 of the last 1000"):
        failures.count([Failed("y")] * 4, range(4), many)


def test_what_is_refused():
    for options, message in (
        ({"on_error": "ignore"}, "on_error must be one of stop, mask, score"),
        ({"on_error": "score"}, "belong together"),
        ({"error_score": 1.0}, "belong together"),
        ({"max_error_share": 0.5}, "for on_error: mask or score"),
    ):
        with pytest.raises(ConfigError, match=message):
            VerifierReward(fails_on_bad, **options)
    with pytest.raises(RewardError, match="wanted to exit"):
        RuleReward(lambda completions: exit(0)).score(BATCH)
    spec = {"type": "rule", "function": "align.data.toy:gold", "timeout": 0}
    with pytest.raises(ConfigError, match="reward.timeout"):
        build_reward(spec)
    with pytest.raises(ConfigError, match="on_error"):
        build_reward({**spec, "timeout": 1, "on_error": "msk"})


def test_none_means_that_a_reward_does_not_apply():
    def only_a(completions):
        return [1.0 if c == "a" else None for c in completions]

    both = CompositeReward([RuleReward(only_a), RuleReward(lambda completions: [0.5, 0.5, None, 2.0], name="other")])
    output = both.score(BATCH, partial=True)
    assert output.scores.nan_to_num(-1).tolist() == [1.5, 0.5, -1.0, 2.0]
    assert output.absent.tolist() == [False, False, True, False] and output.failed is None


def test_trl_arguments():
    class State:
        global_step = 3

    def scheduled(completions, trainer_state, **others):  # as TRL's examples take them
        others["log_metric"]("step", trainer_state.global_step)
        others["log_extra"]("first", [c[0] for c in completions])
        return [float(trainer_state.global_step)] * len(completions)

    batch = RewardBatch(["p"] * 4, BATCH.completions, trainer_state=State())
    output = RuleReward(scheduled, batch_size=3).score(batch)
    assert output.given == {"step": [3.0, 3.0]} and output.columns == {"first": ["a", "b", "c", "d"]}
    with pytest.raises(RewardError, match="needs trainer_state"):
        RuleReward(scheduled).score(BATCH)
    with pytest.raises(RewardError, match="log_extra\\('x', ...\\): 1 values for 4 completions"):
        RuleReward(lambda completions, log_extra: log_extra("x", [1]) or [0.0] * 4).score(BATCH)


def test_what_a_function_logs_is_a_number_by_a_name():
    def logs(name, value):
        reward = RuleReward(lambda completions, log_metric: log_metric(name, value) or [0.0] * 4, name="r")
        return reward.score(BATCH).given

    assert logs("m", torch.tensor(2)) == {"m": [2.0]} and logs("m", float("nan")) == {}  # the mean of nothing
    for name, value in (("m", "abc"), ("m", None), ("m", float("inf")), ("m", torch.ones(2)), (5, 1.0)):
        with pytest.raises(RewardError, match=r"log_metric\(.*\): it takes a name and a finite number"):
            logs(name, value)
    for values in (3, "abcd"):
        with pytest.raises(RewardError, match=r"log_extra\('x', .*\): it takes a name and one value per completion"):
            RuleReward(lambda completions, log_extra, v=values: log_extra("x", v) or [0.0] * 4).score(BATCH)


def test_failures_do_not_change_what_a_reward_is(caplog):
    caplog.set_level(logging.ERROR)
    reward = VerifierReward(fails_on_bad, on_error="mask")
    before = fingerprint(reward)
    reward.score(BATCH, partial=True)
    assert fingerprint(reward) == before
    assert fingerprint(VerifierReward(fails_on_bad, on_error="score", error_score=0.0)) != before
    assert torch.isnan(reward.score(BATCH, partial=True).scores).tolist() == [False, True, False, False]
