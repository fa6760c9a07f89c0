"""Judges of pairs: win rates counted by hand, both orders, ties, what has no verdict, a chat server that is asked."""

import json
import re

import numpy as np
import pytest
import torch

from align.cli.main import main
from align.errors import ConfigError, RewardError
from align.objectives.judging import pairs_within, win_rates
from align.reward_models.base import RewardBatch
from align.reward_models.build import build_reward
from align.reward_models.judge_server import question, read_verdict
from align.reward_models.judges import JudgeReward
from align.reward_models.self_judge import SelfJudge
from align.rollout.types import Completion, Rollout, SamplingParams
from tests.reward_models.test_remote import server

NAN = float("nan")


def longer(prompts, first, second):
    return [
        "first" if len(a) > len(b) else "second" if len(b) > len(a) else "tie"
        for a, b in zip(first, second, strict=True)
    ]


def batch_of(*groups):
    rows = [(number, text) for number, texts in enumerate(groups) for text in texts]
    return RewardBatch(
        [f"p{number}" for number, _ in rows],
        [text for _, text in rows],
        groups=[number for number, _ in rows],
        rows=[10 + number for number, _ in rows],
    )


def test_win_rates_by_hand():
    first, second = pairs_within([7, 7, 3, 7, 3])
    assert list(zip(first, second, strict=True)) == [(0, 1), (0, 3), (1, 3), (2, 4)]
    rates = win_rates(first, second, torch.tensor([0.8, 0.5, NAN, NAN]), 5)
    torch.testing.assert_close(rates, torch.tensor([0.65, 0.2, NAN, 0.5, NAN]), equal_nan=True)
    whole = win_rates(*pairs_within([0] * 4), torch.tensor([1.0, 1, 1, 0.5, 1, 0.75]), 4)  # (01)(02)(03)(12)(13)(23)
    torch.testing.assert_close(whole, torch.tensor([1.0, 0.5, 1.25 / 3, 0.25 / 3]))
    assert whole.sum().item() == pytest.approx(2)  # each pair hands out one win


def test_scores_ties_and_those_that_stand_alone():
    output = JudgeReward(longer, name="longer").score(batch_of(["aaa", "a", "bb", "a"], ["x"], ["q", "q"]))
    torch.testing.assert_close(output.scores, torch.tensor([1, 1 / 6, 2 / 3, 1 / 6, 0.5, 0.5, 0.5]))
    assert output.metrics["ties"] == [0, 0, 0, 0, 1, 0, 1] and output.metrics["consistent"] == [1.0] * 5
    sure = JudgeReward(
        lambda p, a, b: [0.58 if x < y else 0.42 for x, y in zip(a, b, strict=True)], name="j", tie_margin=0.1
    )
    assert sure.score(batch_of(["a", "b"])).scores.tolist() == [0.5, 0.5]

    for worse, better in ((0.45, 0.55), (0.35, 0.65), (0.3, 0.7)):  # as far from 0.5 as the margin, either answer first
        for answers in (["a", "b"], ["b", "a"]):

            def unsure(prompts, first, second, worse=worse, better=better):
                return [better if x < y else worse for x, y in zip(first, second, strict=True)]

            near = JudgeReward(unsure, name="j", tie_margin=round(better - 0.5, 2), swap=False)
            assert near.score(batch_of(answers)).scores.tolist() == [0.5, 0.5]

    def three_to_one(prompts, first, second):
        return [0.75 if x < y else 0.25 for x, y in zip(first, second, strict=True)]

    for margin, scores in ((0.25, [0.5, 0.5]), (0.24, [0.75, 0.25])):
        judged = JudgeReward(three_to_one, name="j", tie_margin=margin).score(batch_of(["a", "b"]))
        assert judged.scores.tolist() == scores


def test_both_orders_take_the_preference_for_a_position_out():
    def lazy(prompts, first, second):
        return ["first"] * len(first)

    both = JudgeReward(lazy, name="lazy").score(batch_of(["a", "b"]))
    assert both.scores.tolist() == [0.5, 0.5] and both.metrics["consistent"] == [0.0]
    once = JudgeReward(lazy, name="lazy", swap=False).score(batch_of(["a", "b"]))
    assert once.scores.tolist() == [1, 0] and once.metrics["consistent"] == []


@pytest.mark.parametrize("as_given", [torch.tensor, np.float32])
def test_numbers_of_torch_and_numpy_are_verdicts(as_given):
    judge = JudgeReward(lambda p, a, b: [as_given(0.75)] * len(a), name="j", swap=False)
    assert judge.score(batch_of(["a", "b"])).scores.tolist() == [0.75, 0.25]
    many = JudgeReward(lambda p, a, b: torch.full((len(a),), 0.75), name="j", swap=False)
    assert many.score(batch_of(["a", "b"])).scores.tolist() == [0.75, 0.25]


def test_what_has_no_verdict_counts_for_neither():
    def shy(prompts, first, second):  # of "?" in the first place, and of "!" anywhere, it says nothing
        return [
            None if a == "?" or "!" in a + b else len(a) < len(b) and 1.0 or 0.0
            for a, b in zip(first, second, strict=True)
        ]

    output = JudgeReward(shy, name="shy", max_error_share=1.0).score(
        batch_of(["?", "long", "!"], ["a", "bbb"]), partial=True
    )
    assert output.scores[:2].tolist() == [1.0, 0.0] and output.failed.tolist() == [False, False, True, False, False]
    assert output.metrics["no_verdict"] == [0, 1, 1, 0]
    with pytest.raises(RewardError, match="failed for 12 of the last 12 completions.*row 11 of the dataset"):
        JudgeReward(lambda p, a, b: [None] * len(a), name="mute").score(batch_of(list("abcdefgh")[:4], list("efgh")))


@pytest.mark.parametrize("verdicts, said", [
    (["better"], "pair 0: expected 'first'"), ([1.5], "got 1.5"), ([True], "got True"), ([], "0 verdicts for 1 pairs"),
])  # fmt: skip
def test_what_is_no_verdict_ends_the_run(verdicts, said):
    with pytest.raises(RewardError, match=said):
        JudgeReward(lambda p, a, b: verdicts, name="j").score(batch_of(["a", "b"]))


def test_a_judge_scores_nothing_alone():
    with pytest.raises(RewardError, match="a judge, which compares the completions of one prompt"):
        JudgeReward(longer, name="j").score(RewardBatch(["p"], ["c"]))
    for spec, said in (
        ({"function": longer, "url": "http://x"}, "give one of them"),
        ({}, "give one of them"),
        ({"url": "http://x"}, "url and model belong together"),
        ({"function": longer, "timeout": 3}, "timeout are options of a server"),
        ({"url": "http://localhost:1/v1", "model": "m", "template": "no.txt"}, "no.txt does not exist"),
    ):
        with pytest.raises(ConfigError, match=said):
            build_reward({"type": "judge", **spec})


def test_the_policy_is_asked_through_its_engine():
    """Both orders of each pair in one call, greedily; what does not fit the engine has no verdict."""

    class Letters:
        chat_template, pad_token_id, eos_token_id = None, None, None
        added_tokens_decoder, all_special_ids, unk_token_id, bos_token_id = {}, [], None, None

        def __call__(self, text, **_):
            return {"input_ids": [ord(letter) for letter in text]}

        def decode(self, ids, **_):
            return "".join(map(chr, ids))

    class Engine:
        def generate(self, prompts, params):
            texts = ["".join(map(chr, ids)) for ids in prompts]
            sides = [re.search(r"Answer A\]\n(.*?)\n\n\[Answer B\]\n(.*?)\n", text, re.S).groups() for text in texts]
            said = ["well: [[A]]" if len(a) > len(b) else "well: [[B]]" for a, b in sides]
            self.asked = (texts, params)
            return [
                Rollout(p, [Completion([ord(c) for c in s], [], "stop")], 0) for p, s in zip(prompts, said, strict=True)
            ]

    judge, engine = SelfJudge("self", max_tokens=16), Engine()
    reward = JudgeReward(judge, name="self", max_error_share=1.0)
    with pytest.raises(RewardError, match="there is no policy to ask"):
        reward.score(batch_of(["a", "bb"]))
    room = judge.tokens(Letters(), prompt=2, completion=4)
    judge.bind(engine, Letters(), room)
    output = reward.score(batch_of(["a", "bb", "cccc"], ["d" * 99, "e"]), partial=True)
    assert output.scores[:3].tolist() == [0.0, 0.5, 1.0] and output.failed.tolist() == [False] * 3 + [True] * 2
    texts, params = engine.asked
    assert len(texts) == 3 and params == [SamplingParams(16, temperature=0.0)] * 3
    assert all(len(text) + 16 <= room for text in texts)


# ---- a chat server --------------------------------------------------------------------------------------------------


def chat(content):
    """Prefers the answer with more "good" in it; of "mute" it says nothing."""
    text = content["messages"][0]["content"]
    a, b = (text.split(f"[Answer {side}]\n")[1].split("\n\n[")[0] for side in "AB")
    said = "[[A]]" if a.count("good") > b.count("good") else "[[B]]" if b.count("good") > a.count("good") else "[[C]]"
    said = "I cannot say" if "mute" in text else f"A says [[C]] itself, but: {said}"
    return {"choices": [{"message": {"content": said}}]}


def test_a_chat_server_judges(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOKEN_OF_TEST", "s3cret")
    with server(chat, statuses=[503]) as (url, seen):
        spec = {"url": url, "model": "judge-7b", "headers": {"Authorization": "Bearer $TOKEN_OF_TEST"}, "backoff": 0.01}
        reward = build_reward({"type": "judge", **spec, "max_tokens": 9, "request": {"top_k": 1}})
        batch = batch_of(["good {prompt} good", "good", "[[A]] bad"])
        batch.prompts = [[{"role": "user", "content": "Why {first}?"}]] * 3
        assert reward.score(batch).scores.tolist() == [1.0, 0.5, 0.0] and reward.name == "judge"
        asked = [content for _, _, content in seen]
        assert len(asked) == 7 and all("[Request]\nuser: Why {first}?\n" in c["messages"][0]["content"] for c in asked)
        assert {(c["model"], c["max_tokens"], c["top_k"], c["temperature"]) for c in asked} == {("judge-7b", 9, 1, 0.0)}
        assert all(headers["Authorization"] == "Bearer s3cret" for _, headers, _ in seen)
        lines = [{"row": i, "sample": 0, "prompt": "p", "completion": c} for i, c in enumerate(["good", "mute"])]
        for name, rows in (("a", lines), ("b", [{**line, "completion": "x"} for line in lines])):
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert main(["compare", "a.jsonl", "b.jsonl", "--judge", f"{{url: '{url}', model: m}}"]) == 0
        found = json.loads((tmp_path / "outputs/compare/compare.json").read_text())["by"]["judge"]
        assert found["preference"] == [1, 0.5] and found["consistent"] == 1  # of what had verdicts
    with server(lambda content: {"error": "?"}) as (url, _), pytest.raises(RewardError, match="choices.0..message"):
        build_reward({"type": "judge", "url": url, "model": "m"}).score(batch_of(["a", "b"]))


def test_the_words_of_the_question():
    assert question("{prompt}|{first}|{second}", "{second}", "{first}", "{prompt}") == "{second}|{first}|{prompt}"
    assert [read_verdict(text) for text in ("[[A]] no, [[B]]", "[[C]]", "A", "[[D]]")] == [0.0, 0.5, None, None]
