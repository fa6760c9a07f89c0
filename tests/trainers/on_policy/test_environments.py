"""Completions of several turns: whose tokens are trained on, how turns are put together, games and tools."""

import asyncio
import time
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import trl

from align.errors import ConfigError, RolloutError
from align.rollout import make_engine
from align.rollout.types import Episode, SamplingParams
from align.trainers.core.ranks import Ranks
from align.trainers.on_policy.batches import collate
from align.trainers.on_policy.buffer import RolloutBuffer
from align.trainers.on_policy.environments import Environments
from align.trainers.on_policy.episodes import Episodes, make_episodes
from align.trainers.on_policy.estimators import make_estimator
from align.trainers.on_policy.objective import kept_lengths, loss_count, policy_objective
from align.trainers.on_policy.samples import Sample
from align.trainers.on_policy.streams import Stream
from align.trainers.on_policy.turn_tokens import TurnTokens
from tests.rollout.rollout_models import llama
from tests.trainers.on_policy.talks import (
    CALLS,
    CHATML,
    NUMBERS,
    GuessingGame,
    Scripted,
    Sums,
    babbling_tokenizer,
    double,
    questions,
    rows,
    talking_tokenizer,
)
from tests.trainers.tiny_runs import assert_same, logged, on_policy, parameters, tiny_model

METHODS = ["grpo", "rloo", "reinforce_pp", "remax", "ppo"]
MASK = [1, 1, 0, 0, 1, 1]


# ---- whose tokens count ---------------------------------------------------------------------------------------------


def sample(mask, length=6):
    episode = None if mask is None else Episode(mask, [], {}, 2, 1.0)
    logps = torch.linspace(-2, -1, length).tolist()
    prompt = {"prompt_ids": [5, 6], "prompt": [], "row": 0}
    made = Sample(prompt, list(range(10, 10 + length)), [], logps, False, 0, episode=episode)
    made.ref_logps, made.old_logps = torch.tensor(logps) - 0.1, torch.tensor(logps) + 0.05
    made.advantages = torch.ones(length, 1)
    return made


@pytest.mark.parametrize("shared", [True, False])
def test_the_tokens_of_an_environment_are_in_no_loss(shared, tmp_path):
    _, args = on_policy("grpo", tmp_path, rollout_correction="sequence_truncate", num_iterations=2)
    _, by_sequence = on_policy("grpo", tmp_path, importance_sampling_level="sequence", num_iterations=2)

    def gradient(samples, options, moved=0.0):
        batch = collate(samples, 0, shared_prefix=shared)
        logps = (batch["engine_logps"] + 0.02).requires_grad_()
        outside = moved * (1 - batch["completion_mask"])
        for name in ("engine_logps", "ref_logps", "old_logps"):
            batch[name] = batch[name] + outside
        losses, _ = policy_objective(logps, batch["advantages"][..., 0], batch, options, kl_coefficient=0.1)
        (losses * batch["completion_mask"]).sum().backward()
        return logps.grad, batch

    for options in (args, by_sequence):
        plain, batch = gradient([sample(MASK), sample(None)], options)
        assert batch["completion_mask"].tolist() == [MASK, [1] * 6]
        assert not plain[0, 2:4].any() and plain[0, [0, 1, 4, 5]].all() and plain[1].all()
        moved, _ = gradient([sample(MASK), sample(None)], options, moved=7.0)
        assert torch.equal(plain, moved)  # whatever the log-probs of the environment's tokens are
    assert kept_lengths(batch["completion_mask"]) == [sample(MASK).written, 6] == [4, 6]
    args.loss_aggregation = "token_mean"
    assert loss_count([4, 6], args) == 10


def test_a_mask_of_ones_changes_no_bit():
    ones, none = (collate([sample(mask), sample(None)], 0, shared_prefix=True) for mask in ([1] * 6, None))
    assert ones.keys() == none.keys() and all(torch.equal(ones[name], none[name]) for name in ones)


@pytest.mark.parametrize("method", METHODS)
def test_advantages_are_those_of_the_policys_tokens_alone(method, tmp_path):
    """As if the environment's tokens were not there, to the bit, for every method."""
    _, args = on_policy(
        method, tmp_path, num_generations=2, **({"gamma": 0.9} if method != "rloo" and method != "grpo" else {})
    )
    torch.manual_seed(0)
    mask = torch.tensor([MASK, [1, 0, 1, 1, 0, 0]], dtype=torch.float32)
    logps, refs, values = torch.randn(3, 2, 6)

    def estimate(pick):
        stream = Stream(
            "task",
            torch.tensor([1.0, -0.5]),
            torch.tensor([[0.2]]),
            0.1,
            pick(logps),
            pick(refs),
            pick(mask),
            pick(values),
        )
        return make_estimator(args).estimate(stream, Ranks())

    def together(tensor):  # the policy's tokens to the left, zeros after them
        rows = [row[own.bool()] for row, own in zip(tensor, mask, strict=True)]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    whole, alone = estimate(lambda tensor: tensor), estimate(together)
    torch.testing.assert_close(together(whole.advantages), alone.advantages)
    assert not (whole.advantages * (1 - mask)).any()
    if whole.returns is not None:
        torch.testing.assert_close(together(whole.returns), alone.returns)


def test_a_rollout_keeps_its_turns_in_a_checkpoint():
    buffer = RolloutBuffer.of([sample(MASK)], 1, 0, 3)
    again = RolloutBuffer.from_state(buffer.state_dict(1), 0, processes=1).samples[0]
    assert again.episode == sample(MASK).episode and again.written == 4


# ---- the tokens between two answers ---------------------------------------------------------------------------------


def test_the_turns_are_the_tokens_that_the_template_writes():
    tokenizer = talking_tokenizer()
    asked, more = [{"role": "user", "content": "guess"}], [{"role": "user", "content": "higher"}]
    said, end = tokenizer("two", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id
    turns = TurnTokens(tokenizer, ["user", "tool"])
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(
        [*asked, {"role": "assistant", "content": "two"}, *more], add_generation_prompt=True, return_dict=False
    )
    assert prompt + said + [end] + turns.between(more, end, {}) == whole
    assert prompt + said + turns.between(more, said[-1], {}) == whole  # it ended with another end token


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            CHATML.replace("{{ m.content }}", "{{ m.content if loop.last or m.role == 'user' }}"),
            "differently once a turn",
        ),
        (CHATML.replace("<|im_end|>", ""), "no[nt].*end|has none"),
        (CHATML.replace("{{ m.content }}", "{{ m.content if m.role != 'tool' }}"), "role tool"),
    ],
)
def test_templates_that_cannot_be_used(template, message):
    with pytest.raises(ConfigError, match=message):
        TurnTokens(talking_tokenizer(template), ["user", "tool"])


# ---- rounds of conversations, with an engine that says what it is told ----------------------------------------------


def talk(engine, environments, params=None, count=1, seeds=None, **options):
    episodes = Episodes(environments, engine.tokenizer, **options)
    asked = [params or SamplingParams(max_tokens=20, seed=3)] * count
    return episodes.complete(engine, rows(engine.tokenizer, count), asked, seeds or [0] * count)


class Echo:
    """Says what it was told, until it hears `three`."""

    def __init__(self):
        self.closed = False

    def reset(self, row):
        return f" {NUMBERS[row['environment_seed'] % 3]}"

    def step(self, answer):
        return answer, 0.5, answer == "three"

    def close(self):
        self.closed = True


def test_a_conversation():
    tokenizer = talking_tokenizer()
    engine = Scripted(tokenizer, "two", "one", "three")
    found = talk(engine, Environments(Echo, [], 5), params=SamplingParams(max_tokens=20, n=2, seed=3), seeds=[1])
    one, other = found[0].completions
    assert found[0].weight_version == 7 and one.finish_reason == "stop" and one.episode == other.episode
    text = "two <|im_end|> <|im_start|> user two <|im_end|> <|im_start|> assistant one <|im_end|> "
    text += "<|im_start|> user one <|im_end|> <|im_start|> assistant three <|im_end|>"
    assert tokenizer.decode(one.token_ids) == text
    assert one.episode.policy_mask == [1] * 2 + [0] * 6 + [1] * 2 + [0] * 6 + [1] * 2
    assert one.logprobs == [-1.0 if own else 0.0 for own in one.episode.policy_mask]
    assert one.episode.reward == 1.5 and one.episode.finished and one.episode.turns == 3
    assert [m["content"] for m in one.episode.messages] == ["two", "two", "one", "one", "three"]
    assert one.episode.prompt["prompt"][-1]["content"] == "guess two"
    assert [len(asked) for asked in engine.asked] == [2, 2, 2]  # several in flight, one call for each round
    assert engine.asked[0][0][0].endswith("guess two <|im_end|> <|im_start|> assistant")
    assert len({own.seed for asked in engine.asked for _, own in asked}) == 6
    assert [asked[0][1].max_tokens for asked in engine.asked] == [20, 12, 4]


def test_where_a_conversation_ends():
    tokenizer = talking_tokenizer()

    def end(limit, answers=("two",) * 3, **options):
        engine = Scripted(tokenizer, *answers, finish=options.pop("finish", "stop"))
        (found,) = talk(engine, Environments(Echo, [], 5), SamplingParams(max_tokens=limit, seed=1), **options)
        (one,) = found.completions
        return one.finish_reason, one.episode.turns, len(one.token_ids), one.episode.reward

    assert end(100, max_turns=2) == ("stop", 2, 10, 1.0)
    assert end(8) == ("length", 1, 2, 0.5)  # no token would be left after the next turn
    assert end(100, finish="length") == ("length", 1, 2, 0.0)  # it did not hear the end of the answer


class Broken(Echo):
    def step(self, answer):
        if answer == "one":
            time.sleep(30)
        return ("two", float("nan"), False) if answer == "two" else 1 / 0


@pytest.mark.parametrize(
    ("answer", "message"),
    [("one", "did not return within"), ("two", "no finite number"), ("three", "ZeroDivisionError")],
)
def test_an_environment_that_fails(answer, message):
    tokenizer = talking_tokenizer()
    with pytest.raises(RolloutError, match=f"environment Broken, row 0.*after 1 answers.*{message}.*on_error: mask"):
        talk(Scripted(tokenizer, answer), Environments(Broken, [], 0.2))
    (found,) = talk(Scripted(tokenizer, answer), Environments(Broken, [], 0.2), stops=False)
    assert message in found.completions[0].episode.failure and found.completions[0].episode.reward is None


class SlowToMake(Echo):
    made = 0

    def __init__(self):
        type(self).made += 1
        time.sleep(30 * (self.made > 1))


def test_an_environment_that_is_not_made_in_time():
    tokenizer = talking_tokenizer()
    with pytest.raises(RolloutError, match=r"SlowToMake was not made within environment_timeout \(0.2 s\)"):
        talk(Scripted(tokenizer, "one"), Environments(SlowToMake, [], 0.2))


def test_draws_do_not_depend_on_who_else_talks():
    """With transformers: the conversation of a prompt alone is the one that it has among others."""
    tokenizer = talking_tokenizer()
    engine = make_engine(tiny_model(tokenizer), tokenizer, backend="transformers", max_model_len=40)
    episodes = Episodes(Environments(GuessingGame, [], 5), tokenizer)
    params = [SamplingParams(max_tokens=24, n=2, seed=i) for i in range(4)]
    together = episodes.complete(engine, rows(tokenizer, 4), params, [0, 1, 2, 3])
    (alone,) = episodes.complete(engine, rows(tokenizer, 1), params[2:3], [2])
    assert [c.token_ids for c in alone.completions] == [c.token_ids for c in together[2].completions]
    assert max(c.episode.turns for rollout in together for c in rollout.completions) == 2


# ---- tools ----------------------------------------------------------------------------------------------------------


async def slow(number: str) -> str:
    """Twice a number.

    Args:
        number: its name.
    """
    await asyncio.sleep(0.001)
    return double(number)


slow.__name__ = "double"


@pytest.mark.parametrize(
    "environments", [Environments(None, [double], 5), Environments(None, [slow], 5), Environments(Sums, [], 5)]
)
def test_tools_are_called(environments):
    tokenizer = talking_tokenizer()
    calls = [f"<tool_call> {CALLS[i]} </tool_call>" for i in (0, 2)]
    engine = Scripted(tokenizer, f"{calls[0]} {calls[1]}", "<tool_call> one </tool_call>", "two")
    (found,) = talk(engine, environments, SamplingParams(max_tokens=60, seed=1))
    (one,) = found.completions
    said = [(m["role"], m["content"]) for m in one.episode.messages]
    assert [role for role, _ in said] == ["assistant", "tool", "tool", "assistant", "tool", "assistant"]
    assert said[1][1] == "two" and "'three'" in said[2][1] and "no JSON" in said[4][1] and said[5][1] == "two"
    assert (one.episode.calls, one.episode.failed_calls, one.episode.finished) == (3, 2, True)
    assert one.episode.reward == (2.0 if environments.scores else None)


def test_a_template_that_drops_thoughts_is_exchanged_for_trls(tmp_path):
    qwen3 = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text(encoding="utf-8")
    with pytest.raises(ConfigError, match="differently once a turn"):
        TurnTokens(talking_tokenizer(qwen3), ["tool"])
    tokenizer = talking_tokenizer(qwen3)
    assert make_episodes(on_policy("rloo", tmp_path)[1], [double], None, tokenizer).tokenizer.chat_template != qwen3
    assert tokenizer.chat_template == qwen3  # which is saved with the model


def test_what_is_refused(tmp_path):
    def untold(number):
        return number

    for make, message in (
        (lambda: Environments(None, [untold], 5), "tool .*untold"),
        (lambda: Environments({}, [], 5), "names no environment"),
        (lambda: Environments(object, [], 5), "no method reset"),
        (lambda: Environments(None, [double, double], 5), "same name"),
        (lambda: on_policy("rloo", tmp_path, environment_on_error="ignore"), "environment_on_error"),
        (lambda: on_policy("rloo", tmp_path, max_turns=0), "max_turns"),
        (lambda: make_episodes(on_policy("rloo", tmp_path, max_turns=2)[1], None, None, None), "max_turns"),
        (
            lambda: Episodes(Environments(None, [double], 5), talking_tokenizer(CHATML.replace("<tool_call>", ""))),
            "Qwen",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            make()
    tokenizer = talking_tokenizer()
    with pytest.raises(RolloutError, match="take conversations"):
        plain = [{"prompt": "guess", "prompt_ids": [3], "row": 0}]
        Episodes(Environments(Echo, [], 5), tokenizer).complete(
            Scripted(tokenizer, "one"), plain, [SamplingParams(max_tokens=5, seed=1)], [0]
        )


# ---- runs -----------------------------------------------------------------------------------------------------------


def game(method, folder, tokenizer, **options):
    trainer_class, args = on_policy(
        method,
        folder,
        **{"max_prompt_length": 8, "max_completion_length": 16, "num_generations": 8, "beta": 0.0, **options},
    )
    model = tiny_model(tokenizer, num_hidden_layers=1)
    return trainer_class(model, None, args, questions(64), processing_class=tokenizer, environment_factory=GuessingGame)


def test_a_guessing_game_is_learned(tmp_path):
    tokenizer = talking_tokenizer()
    trainer = game("rloo", tmp_path, tokenizer, max_steps=20, learning_rate=5e-3)
    trainer.train()
    won = logged(trainer, "rewards/GuessingGame")
    assert max(won[:3]) < 0.1 and sum(won[-5:]) / 5 > 0.25
    assert max(logged(trainer, "rollout/mean_abs_logp_diff")) < 1e-5  # the tokens are those that were drawn
    assert 1 < logged(trainer, "environment/turns")[-1] <= 2 and logged(trainer, "environment/tokens")[-1] > 2


@pytest.mark.parametrize("method", ["grpo", "remax", "ppo", "online_dpo"])
def test_a_run_goes_on_from_the_middle_of_a_rollout(method, tmp_path):
    """Resumed inside a rollout it is bit for bit the run that was not interrupted."""
    tokenizer = talking_tokenizer()
    options = {"num_generations": 2, "num_mini_batches": 2, "per_device_train_batch_size": 4, "save_strategy": "steps",
               "save_steps": 1, "max_steps": 3, "learning_rate": 5e-3, "beta": 0.1}  # fmt: skip
    whole = game(method, tmp_path / "whole", tokenizer, **options)
    whole.train()
    again = game(method, tmp_path / "again", tokenizer, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert_same(parameters(whole.model), parameters(again.model))


class Locked(Sums):
    """As TRL's examples: without a reward of its own, and with what can neither be copied nor saved."""

    get_reward = None
    given: ClassVar[list] = []

    def reset(self, **row):
        super().reset(**row)
        self.lock = (i for i in [])


def test_rewards_get_the_environments_as_trls_do(tmp_path):
    """Those of the completions, in training and evaluations, also in calls about some of them; in no checkpoint."""

    def calls_made(environments, completions, **columns):
        assert len(environments) == len(completions) == 2 and all(one.lock for one in environments)
        told = [sum(m["role"] == "tool" for m in talk) for talk in completions]  # less than called where one was cut
        assert all(one.called >= count for one, count in zip(environments, told, strict=True))
        Locked.given.extend(environments)
        return [float(one.called) for one in environments]

    model = llama(3, vocab_size=96)
    model.generation_config.eos_token_id = list(range(3, 96, 4))
    several = {"num_iterations": 2, "max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    trainer_class, args = on_policy("rloo", tmp_path, max_completion_length=60, **several)
    world = {"environment_factory": Locked, "processing_class": babbling_tokenizer()}
    reward = {"type": "rule", "function": calls_made, "batch_size": 2}
    trainer = trainer_class(model, reward, args, questions(32), questions(2), **world)
    trainer.train()
    trainer.train(resume_from_checkpoint=tmp_path / "checkpoint-1")  # inside a rollout
    trainer.close()
    assert len(set(map(id, Locked.given))) == len(Locked.given)
