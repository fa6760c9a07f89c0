"""Scores of conversations that have ended while others go on, and of completions that are drawn in parts."""

import re
import threading

import pytest

from align.reward_models.composite import CompositeReward
from align.reward_models.judge_server import ServerJudge
from align.reward_models.judges import JudgeReward
from align.reward_models.remote import RemoteReward
from align.reward_models.rules import RuleReward
from tests.reward_models.test_remote import server
from tests.rollout.rollout_models import llama
from tests.trainers.on_policy.elsewhere import Elsewhere
from tests.trainers.on_policy.talks import GuessingGame, babbling_tokenizer, double, questions
from tests.trainers.on_policy.test_early_scores import PARTS, trained, without_times
from tests.trainers.tiny_runs import assert_same, logged, on_policy, parameters


class Counted:
    """How many completions a reward server was sent."""

    def __init__(self):
        self.more, self.count = threading.Condition(), 0

    def __call__(self, content: dict) -> dict:
        with self.more:
            self.count += len(content["completions"])
            self.more.notify_all()
        return {"scores": [float(len(text)) for text in content["completions"]]}

    def wait_for(self, count: int) -> None:
        with self.more:
            assert self.more.wait_for(lambda: self.count >= count, timeout=20), f"{self.count} of {count} were scored"


class OftenEnding(Elsewhere):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.eos_token_ids = (*self.eos_token_ids, *range(3, self.vocab_size, 4))


def test_what_has_ended_by_earlier_weights_is_scored_while_the_rest_is_drawn(policy, tokenizer, tmp_path, monkeypatch):
    """In the call in which a rollout is due, and not before: what is asked for the next ones is of their steps."""
    counted = Counted()
    waits = staticmethod(lambda call: counted.wait_for(16 * (call - 1) + 1) if call > 1 else None)
    monkeypatch.setattr(Elsewhere, "before", waits)
    with server(counted) as (url, _):
        trained(policy, tokenizer, tmp_path, RemoteReward(url, batch_size=1), OftenEnding, **PARTS)
    assert counted.count == 4 * 16


class AtTheEnd(Elsewhere):
    tells = False


class Hinted(GuessingGame):
    """Says something to every other prompt, fails once in a while, and notes when it is left."""

    closed: list = []

    def reset(self, row):
        super().reset(row)
        return f" {self.secret}" if row["environment_seed"] % 2 else None

    def step(self, answer):
        text, reward, done = super().step(answer)
        if not sum(map(ord, answer)) % 5:
            raise ValueError("an answer that breaks it")
        return text, reward + len(answer) / 100, done

    def close(self):
        self.closed.append(self.guesses)


def talking(folder, engine_class, rewards, method="rloo", gold=None, **options):
    text, model = babbling_tokenizer(), llama(3, vocab_size=96)
    model.generation_config.eos_token_id = list(range(3, 96, 4))  # answers of about four tokens, as in `talking_run`
    engine = engine_class(model, text, max_model_len=256)
    options = {"max_steps": 2, "learning_rate": 5e-3, "seed": 6, "max_completion_length": 40, **options}
    trainer_class, args = on_policy(method, folder, environment_on_error="mask", max_prompt_length=32, **options)
    world = {"environment_factory": Hinted, "tools": [double], "processing_class": text}
    data = questions(64), questions(6) if "eval_strategy" in options else None
    trainer = trainer_class(model, rewards, args, *data, gold_reward=gold, engine=engine, **world)
    return trainer


def said(content) -> dict:
    if "messages" in content:
        first, second = re.findall(r"\[Answer .\]\n(.*?)\n\n", content["messages"][0]["content"], re.S)
        return {"choices": [{"message": {"content": "[[A]]" if len(first) % 7 > len(second) % 7 else "[[B]]"}}]}
    earned = content["columns"].get("environment_reward") or [1.0] * len(content["completions"])
    talks = zip(content["prompts"], content["completions"], earned, strict=True)
    return {
        "scores": [
            len(prompt[-1]["content"]) / 7 + len(talk) + (0.5 if own is None else own) for prompt, talk, own in talks
        ]
    }


def test_conversations_that_have_ended_are_scored_while_others_go_on(tmp_path, monkeypatch):
    """And their environments are closed."""
    counted = Counted()

    def before(call):
        if call == 3:
            counted.wait_for(1)
            assert 0 < len(Hinted.closed) < 16

    Hinted.closed.clear()
    monkeypatch.setattr(Elsewhere, "before", before)
    with server(counted) as (url, _):
        trainer = talking(tmp_path, Elsewhere, RemoteReward(url, batch_size=1), max_steps=1)
        trainer.train()
    assert counted.count == 16 and trainer.engine.current.number > 3


@pytest.mark.parametrize(
    ("method", "further"), [("remax", {}), ("rloo", {"dynamic_sampling_rounds": 1, "num_generations": 2})]
)
def test_a_run_of_conversations_is_the_same_to_the_bit(tmp_path, method, further, caplog):
    """What environments add to prompts, what they give, which fail; functions of users, called when all have ended."""
    found, called = [], []

    async def spoken(completions):
        called.append((trainer.engine.current.number, len(completions)))
        return [float(sum(len(turn["content"]) for turn in talk)) for talk in completions]

    with server(said) as (url, _):
        for engine_class in (Elsewhere, AtTheEnd):
            called.clear()
            caplog.clear()
            rewards = [
                RemoteReward(url, batch_size=3, columns=["environment_reward"]),
                CompositeReward(
                    [RemoteReward(url, name="one", batch_size=2), RuleReward(spoken, batch_size=4)], name="both"
                ),
                JudgeReward(ServerJudge(url, "m"), name="judge", max_error_share=1.0),
            ]
            gold = RemoteReward(url, name="gold", batch_size=5, columns=["environment_reward"])
            options = {"eval_strategy": "steps", "eval_steps": 1, **further}
            trainer = talking(tmp_path / engine_class.__name__, engine_class, rewards, method, gold, **options)
            trainer.train()
            warned = [r.getMessage() for r in caplog.records if "breaks it" in r.getMessage()]
            found.append((without_times(trainer), sorted(called), warned, parameters(trainer.model)))
    assert found[0][:3] == found[1][:3] and warned
    assert_same(found[0][3], found[1][3])
    assert min(logged(trainer, "environment/turns")) > 1.5 and max(logged(trainer, "loss")) != 0
