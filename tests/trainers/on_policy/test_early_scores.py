"""Completions that are there are scored while others are drawn, and nothing but time depends on it."""

import asyncio
import copy
import logging
import random
import re
import subprocess
import sys
import threading

import pytest

from align.errors import RewardError, RolloutError
from align.reward_models.base import RewardBatch
from align.reward_models.composite import CompositeReward
from align.reward_models.early import EarlyRewards
from align.reward_models.ensemble import RewardEnsemble
from align.reward_models.judge_server import ServerJudge
from align.reward_models.judges import JudgeReward
from align.reward_models.remote import RemoteReward
from align.reward_models.rules import RuleReward
from align.reward_models.verifier import VerifierReward
from align.trainers.core.recorder import Recorder
from align.trainers.on_policy.engine import SyncedEngine
from tests.reward_models.test_remote import server
from tests.trainers.on_policy.elsewhere import PLACE, Elsewhere
from tests.trainers.tiny_runs import WANTED, assert_same, logged, on_policy, parameters, prompts, tiny_model

called = threading.Event()


class Batches(Elsewhere):
    """Eight sequences at a time: a rollout of sixteen is told in two halves. slow: the second half waits for a call of
    a reward."""

    slow = False

    def _decode(self, rows):
        if self.slow and rows[0].request.params.temperature:
            self.halves = getattr(self, "halves", 0) + 1
            assert self.halves % 2 or called.wait(20), "no reward was called while completions were drawn"
            called.clear()
        super()._decode(rows)


class AtTheEnd(Batches):
    tells = False


def trained(policy, tokenizer, folder, reward, engine_class=Batches, method="rloo", gold=None, **options):
    args = {"max_steps": 2, "learning_rate": 1e-2, "per_device_train_batch_size": 8, "seed": 3, **options}
    trainer_class, args = on_policy(method, folder, **args)
    engine = engine_class(tiny_model(tokenizer), tokenizer, max_model_len=22, max_num_seqs=8)
    evaluated = prompts(12, seed=1) if args.do_eval else None
    trainer = trainer_class(policy, reward, args, prompts(32), evaluated, gold_reward=gold, engine=engine)
    trainer.train()
    return trainer


def without_times(trainer) -> list[dict]:
    """All that was logged, but for how long it took."""
    times = ("time/", "train_", "eval_runtime")
    return [
        {key: value for key, value in line.items() if not key.startswith(times) and "per_second" not in key}
        for line in trainer.state.log_history
    ]


async def good(completion) -> bool:
    """Whether it has a wanted word; one that begins with a certain letter breaks it."""
    await asyncio.sleep(0.001 * random.random())
    called.set()
    if completion.startswith("c"):
        raise ValueError("a letter that breaks it")
    return any(word in WANTED for word in completion.split())


def even(completions, **_) -> list[float | None]:
    return [None if not len(text) % 3 else float(len(text) % 2) for text in completions]


def test_the_first_completions_are_scored_while_others_are_drawn(policy, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(Batches, "slow", True)
    trained(policy, tokenizer, tmp_path, VerifierReward(good, on_error="mask", max_error_share=1.0))


def test_a_checker_of_ours_is_called_while_vllm_or_transformers_draws_in_this_process(policy, tokenizer, tmp_path):
    """And a function of the user's, which may draw from the random states that the engine puts back, is not."""
    begun = {}
    for reward in (VerifierReward(good), {"type": "unit_tests"}, RemoteReward("http://127.0.0.1:9")):
        batch = RewardBatch(["p"] * 4, [""] * 4, columns={"tests": ["assert True"] * 4})
        rewards = [
            reward if not isinstance(reward, dict) else VerifierReward("align.reward_models.checkers:python_tests")
        ]
        for user_code in (True, False):
            early = EarlyRewards(rewards, batch, user_code=user_code, partial=True)
            begun.setdefault(rewards[0].name, []).append(bool(early.begun))
            early.stop()
    assert begun == {"good": [True, False], "python_tests": [True, True], "remote": [True, True]}


PARTS = {"partial_rollouts": 3, "rollout_correction": "token_truncate", "max_steps": 4}
AHEAD = {"rollouts_ahead": 1, "rollout": PLACE}


@pytest.mark.parametrize(
    ("method", "further"),
    [("rloo", {}), ("remax", {}), ("rloo", PARTS), ("remax", PARTS), ("rloo", {**PARTS, **AHEAD})],
)
def test_a_run_is_the_same_to_the_bit(policy, tokenizer, tmp_path, method, further, caplog):
    """Scores, what fails and is left out, what is logged of it, evaluations and weights, whatever the order in which
    calls end; ReMax's greedy answers stand behind the others."""
    found = []

    def uneven(content):
        if "messages" in content:
            first, second = re.findall(r"\[Answer .\]\n(.*?)\n\n", content["messages"][0]["content"], re.S)
            said = "[[A]]" if len(first) > len(second) else "[[B]]" if len(first) % 5 else "hm"
            return {"choices": [{"message": {"content": said}}]}
        pairs = zip(content["prompts"], content["completions"], strict=True)
        return {"scores": [len(text) + len(prompt) / 7 for prompt, text in pairs]}

    with server(uneven) as (url, _):
        for engine_class in (Batches, AtTheEnd):
            rewards = [
                VerifierReward(good, on_error="mask", max_error_share=1.0),
                CompositeReward(
                    [RuleReward(even, batch_size=3, concurrency=2), RemoteReward(url, batch_size=2)], name="both"
                ),
                RewardEnsemble(
                    [RemoteReward(url, name=f"m{i}", batch_size=3 + i) for i in range(2)],
                    "wco",
                    name="wco",
                    normalize=False,
                ),
                JudgeReward(ServerJudge(url, "m"), name="judge", max_error_share=1.0),
            ]
            caplog.clear()
            gold = RemoteReward(url, name="gold", batch_size=5)
            options = {"eval_strategy": "steps", "eval_steps": 1, "do_eval": True, **further}
            trainer = trained(
                policy, tokenizer, tmp_path / engine_class.__name__, rewards, engine_class, method, gold, **options
            )
            lines = without_times(trainer)
            warned = [
                r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "a letter" in r.getMessage()
            ]
            found.append((lines, warned, parameters(trainer.model)))
    assert found[0][0] == found[1][0]
    assert found[0][1] == found[1][1] and len(found[0][1]) == 3
    assert_same(found[0][2], found[1][2])
    assert any(line.get("rewards/good/failed") for line in found[0][0])


def test_errors_are_those_of_scoring_at_the_end(policy, tokenizer, tmp_path):
    """With the place of the completion in the batch, not in the part of it that came."""
    seen: list[list[str]] = []

    def sees(completions):
        seen.append(list(completions))
        return [0.0] * len(completions)

    trained(policy, tokenizer, tmp_path / "seen", RuleReward(sees), max_steps=1)
    bad = next(text for text in reversed(seen[0]) if seen[0].count(text) == 1)

    async def breaks(completion) -> bool:
        if completion == bad:
            raise ValueError("this one")
        return True

    def no_number(completions) -> list[float]:
        return [float("nan") if text == bad else 1.0 for text in completions]

    with server(lambda content: {"scores": no_number(content["completions"])}) as (url, _):
        for number, make in enumerate(
            [
                lambda: VerifierReward(breaks),
                lambda: RuleReward(no_number, batch_size=3, concurrency=2),
                lambda: RemoteReward(url, batch_size=4),
                lambda: RemoteReward(url, columns=["label"]),
                lambda: VerifierReward(good, columns={"answer": "label"}),
            ]
        ):
            said = []
            for engine_class in (Batches, AtTheEnd):
                with pytest.raises(RewardError) as raised:
                    trained(policy, tokenizer, tmp_path / f"{number}{engine_class.__name__}", make(), engine_class)
                said.append(str(raised.value))
            assert said[0] == said[1]
            wanted = "has no column label" if number > 2 else rf"rows? \[?{seen[0].index(bad)}\]? "
            assert re.search(wanted, said[0]), said[0]


class Halved(VerifierReward):
    """A user's own: it knows nothing of scores that begin early."""

    def _score(self, batch):
        output = super()._score(batch)
        output.scores /= 2
        return output


def test_a_subclass_that_scores_in_another_way_is_asked_for_whole_batches(policy, tokenizer, tmp_path):
    trainers = [
        trained(policy, tokenizer, tmp_path / kind.__name__, kind(whether, concurrency=2))
        for kind in (Halved, VerifierReward)
    ]
    half, whole = (logged(trainer, "reward") for trainer in trainers)
    assert half[0] * 2 == pytest.approx(whole[0]) and whole[0] > 0


def whether(completion) -> bool:
    return len(completion) % 2 == 0


class OldComplete(Batches):
    """Users' engines from before engines told anything."""

    def _complete(self, requests, progress):
        return super()._complete(requests, progress)


class OldGenerate:
    def generate(self, prompts, params):
        return super().generate(prompts, params)


class Mixed(OldGenerate, Batches):
    pass


class Cut(Batches):
    """Returns something else than what was told."""

    tells = True

    def generate(self, prompts, params, **options):
        rollouts = copy.deepcopy(super().generate(prompts, params, **options))
        for completion in (completion for rollout in rollouts for completion in rollout.completions):
            completion.token_ids, completion.finish_reason = completion.token_ids[:3], "length"
            completion.logprobs = completion.logprobs and completion.logprobs[:3]
        return rollouts


class CutAtTheEnd(Cut):
    tells = False


async def lengths(completions) -> list[float]:
    return [float(len(text)) for text in completions]


@pytest.mark.parametrize(("engine", "like"), [(OldComplete, AtTheEnd), (Mixed, AtTheEnd), (Cut, CutAtTheEnd)])
def test_an_engine_that_completes_in_its_own_way(policy, tokenizer, tmp_path, engine, like):
    """One that knows nothing of `on_done` is not asked to tell, and what is scored is what it returns."""
    options = {"eval_strategy": "steps", "eval_steps": 1, "do_eval": True}
    found = [
        trained(policy, tokenizer, tmp_path / kind.__name__, RuleReward(lengths, batch_size=3), kind, **options)
        for kind in (engine, like)
    ]
    keys = ("reward", "eval_proxy", "completions/mean_length")
    assert [logged(found[0], key) for key in keys] == [logged(found[1], key) for key in keys]
    assert_same(*(parameters(trainer.model) for trainer in found))
    assert (max(logged(found[0], "completions/mean_length")) <= 3) is (engine is Cut)


def test_an_engine_around_whose_generate_another_function_stands(tokenizer):
    engine = Batches(tiny_model(tokenizer), tokenizer, max_model_len=22)
    synced = SyncedEngine(lambda model: engine, engine, recorder=Recorder())
    assert synced.tells
    generate = engine.generate
    engine.generate = lambda prompts, params: generate(prompts, params)
    assert not synced.tells


def test_a_judge_that_asks_its_server_in_its_own_way():
    class Longest(ServerJudge):
        def __call__(self, prompts, first, second):
            return [float(len(a) > len(b)) for a, b in zip(first, second, strict=True)]

    reward = JudgeReward(Longest("http://127.0.0.1:9", "m", retries=0), name="judge")
    batch = RewardBatch(["p"] * 3, ["a", "bbb", "cc"], groups=[0, 0, 0])
    assert reward.begin(batch, user_code=True) is None
    assert reward.score(batch).scores.tolist() == [0.0, 1.0, 0.5]


def test_a_function_of_no_module_is_the_users():
    made: dict = {}
    exec("async def written(completions): return [1.0 for _ in completions]", made)
    reward = RuleReward(made["written"])
    assert reward.begin(RewardBatch(["p"], ["c"]), user_code=False) is None
    assert reward.score(RewardBatch(["p"], ["c"])).scores.tolist() == [1.0]


def test_an_interrupted_process_does_not_wait_for_calls_that_hang():
    code = """
import os, signal, sys, threading, time
from align.reward_models.base import RewardBatch
from align.reward_models.rules import RuleReward
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
def hangs(completions):
    while sys._current_frames()[threading.main_thread().ident].f_code.co_name != "wait":
        time.sleep(0.1)
    time.sleep(0.5)  # Python does not hear a signal that comes just before it waits
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(600)
RuleReward(hangs, batch_size=1, concurrency=1).score(RewardBatch(["p"] * 3, ["c"] * 3))
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ended.stderr.rstrip().endswith("KeyboardInterrupt"), ended.stderr


def test_calls_that_are_under_way_when_the_engine_fails_are_given_up(policy, tokenizer, tmp_path, monkeypatch):
    begun, given_up = threading.Event(), threading.Event()

    async def waits(completion) -> bool:
        begun.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            given_up.set()
            raise
        return True

    def fails(self, rows):
        if getattr(self, "halves", 0):
            assert begun.wait(20)
            raise RolloutError("the engine is gone")
        self.halves = 1
        Elsewhere._decode(self, rows)

    monkeypatch.setattr(Batches, "_decode", fails)
    with pytest.raises(RolloutError, match="the engine is gone"):
        trained(policy, tokenizer, tmp_path, VerifierReward(waits))
    assert given_up.wait(20)
