"""Preference pairs as text, from every format, and the scores of rewards that refuse some of them."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from align.errors import ConfigError, DataError, RewardError
from align.evaluation.pair_scores import score_pairs
from align.evaluation.pairs import prompt_keys, read_pairs, sample_places, text_length
from align.reward_models.base import Reward, RewardOutput


def said(role, content):
    return [{"role": role, "content": content}]


ROLES = (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant"))
PLAIN = {"prompt": ["p0", "p1", "p1"], "chosen": ["a", "bb", "c"], "rejected": ["d", "e", "ff"]}


def read(columns, **options):
    pairs, report = read_pairs(Dataset.from_dict(columns), **options)
    report.check(0.5)
    return pairs


def test_plain_texts_stay_texts_and_other_columns_stay_with_their_row():
    pairs = read({**PLAIN, "margin": [1.0, 2.0, 3.0], "row": [7, 8, 9]}, rows=[0, 2])
    assert pairs.prompts == ["p0", "p1"] and pairs.rejected == ["d", "ff"] and pairs.rows == [0, 2]
    assert pairs.columns == {"margin": [1.0, 3.0], "row": [7, 9]} and pairs.subsets is None and not pairs.chat


def test_every_shape_of_messages_gives_the_same_pairs():
    prompts = [said("user", p) for p in PLAIN["prompt"]]
    chosen, rejected = ([said("assistant", t) for t in PLAIN[name]] for name in ("chosen", "rejected"))
    explicit = read({"prompt": prompts, "chosen": chosen, "rejected": rejected})
    whole = [[p + a for p, a in zip(prompts, answers, strict=True)] for answers in (chosen, rejected)]
    implicit = read({"chosen": whole[0], "rejected": whole[1]})
    copied = read({"prompt": PLAIN["prompt"], "chosen": whole[0], "rejected": whole[1]})
    mixed = read({"prompt": PLAIN["prompt"], "chosen": chosen, "rejected": rejected})
    made = read(PLAIN, chat=True)
    for pairs in (explicit, implicit, copied, mixed, made):
        assert (pairs.prompts, pairs.chosen, pairs.rejected) == (prompts, chosen, rejected)
    assert made.chat and not mixed.chat
    assert text_length(made.chosen[1]) == 2 and prompt_keys(made)[1] == prompt_keys(made)[2] != prompt_keys(made)[0]


def test_rewardbench_subsets_are_messages_unless_told_otherwise():
    columns = {**PLAIN, "subset": ["hep-go", "math-prm", "hep-go"], "id": [1, 2, 3]}
    assert read(columns).chat and read(columns).rewardbench and read(columns).prompts[0] == said("user", "p0")
    assert read(columns, chat=False).prompts[0] == "p0"
    other = read({**columns, "subset": ["hep-go", "mine", "hep-go"]})
    assert not other.chat and not other.rewardbench and other.subsets == ["hep-go", "mine", "hep-go"]


def test_bad_rows_are_named():
    columns = {
        "prompt": ["p", "p", "p", "p", "p"],
        "chosen": ["a", "same", "", "b", "c"],
        "rejected": ["b", "same", "x", "c", "d"],
        "subset": ["s", "s", "s", None, "s"],
    }
    pairs, report = read_pairs(Dataset.from_dict(columns), source="mine.jsonl")
    assert pairs.rows == [0, 4] and report.bad == 3
    with pytest.raises(DataError, match="mine.jsonl: 3 of 5 rows cannot be used .*chosen equals rejected: 1 .row 1."):
        report.check(0.5)
    _, tools = read_pairs(Dataset.from_dict({**PLAIN, "tools": ["search", None, None]}))
    assert tools.reasons == {"tools are not supported here, only in demonstrations and pairs that are trained on": [0]}
    kwargs = [{"enable_thinking": False}, {"enable_thinking": None}, None]
    _, ignored = read_pairs(Dataset.from_dict({**PLAIN, "chat_template_kwargs": kwargs}))
    assert list(ignored.reasons.values()) == [[0]] and "would be ignored" in next(iter(ignored.reasons))


def test_what_a_chat_template_is_given_reaches_the_reward():
    tool = {"type": "function", "function": {"name": "get", "description": "d", "parameters": {}}}
    given = {"chat_template_kwargs": [{"style": "plain"}, None], "tools": [[tool], None]}
    rows = {name: [[{"role": role, "content": f"{name}{i}"}] for i in range(2)] for name, role in ROLES}
    pairs, report = read_pairs(Dataset.from_dict({**rows, **given}))
    assert not report.bad and pairs.columns["chat_template_kwargs"] == given["chat_template_kwargs"]
    assert pairs.columns["tools"][0][0]["function"]["name"] == "get" and pairs.columns["tools"][1] is None
    plain = {name: ["a", "b"] if name == "chosen" else ["c", "d"] for name, _ in ROLES}
    assert not read_pairs(Dataset.from_dict({**plain, **given}), chat=True)[1].bad
    call = {"type": "function", "function": {"name": "get", "arguments": {}}}
    asks = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    _, calls = read_pairs(Dataset.from_dict({**rows, "chosen": [asks, rows["chosen"][1]], **given}))
    assert calls.reasons == {"chosen has tool calls, and answers are compared as texts here": [0]}


def test_columns_that_are_no_pairs():
    with pytest.raises(DataError, match="no preference pairs: expected the columns 'chosen' and 'rejected'"):
        read({"prompt": ["p"], "completion": ["c"]})


def test_samples():
    assert sample_places(5, None, 0) == sample_places(5, 9, 0) == [0, 1, 2, 3, 4]
    chosen = sample_places(100, 10, 3)
    assert len(set(chosen)) == 10 and chosen == sorted(chosen) == sample_places(100, 10, 3) != sample_places(100, 10, 4)
    with pytest.raises(ConfigError, match="at least one pair, got 0"):
        sample_places(5, 0, 0)


# ---- scores ---------------------------------------------------------------------------------------------------------


class Picky(Reward):
    """The length of an answer; refuses a batch with a completion that is in `refuses`. `seen`: batch sizes."""

    name = "picky"

    def __init__(self, refuses=(), limit=None):
        self.refuses, self.limit, self.seen = refuses, limit, []

    def _score(self, batch):
        self.seen.append(len(batch))
        if self.limit and len(batch) > self.limit:
            raise RewardError(f"reward 'picky': {len(batch)} are too many")
        for row, text in enumerate(batch.completions):
            if text in self.refuses:
                raise RewardError(f"reward 'picky', row {row} of the batch: {text} is too long")
        lengths = torch.tensor([float(len(t)) for t in batch.completions])
        return RewardOutput(lengths, {"member/0": -lengths, "mean": lengths})


def pairs_of(n):
    return read({"prompt": ["p"] * n, "chosen": ["a" * (i + 2) for i in range(n)], "rejected": ["b"] * n})


def test_scores_and_members_of_both_answers():
    found = score_pairs(Picky(), pairs_of(300))
    assert found.chosen.tolist() == list(range(2, 302)) and set(found.rejected) == {1.0} and found.failed == []
    assert found.margins[3] == 4 and found.both.shape == (600,) and list(found.members) == ["member/0"]
    assert found.members["member/0"].tolist() == [(-found.chosen).tolist(), (-found.rejected).tolist()]
    part = found.select([2, 0])
    assert part.chosen.tolist() == [4, 2] and part.members["member/0"][0].tolist() == [-4, -2]


def test_one_answer_that_is_refused_costs_its_pair_only():
    reward = Picky(refuses=("a" * 5, "a" * 290))
    found = score_pairs(reward, pairs_of(300))
    assert found.failed == [3, 288] and found.reason == "reward 'picky': aaaaa is too long"
    assert np.flatnonzero(np.isnan(found.margins)).tolist() == [3, 288]
    assert np.nansum(found.chosen) == sum(range(2, 302)) - 5 - 290
    assert np.isnan(found.members["member/0"][:, 3]).all()


def test_a_reward_that_refuses_everything_is_an_error_at_once():
    reward = Picky(refuses=["a" * n for n in range(400)])
    with pytest.raises(RewardError, match="row 0 of the batch: aa is too long"):
        score_pairs(reward, pairs_of(300))
    assert reward.seen == [512] + [2] * 16  # a server that is down is not asked 300 times
    down = Picky(refuses=["a" * n for n in range(258, 400)])  # from the second batch on
    with pytest.raises(RewardError, match="row 0 of the batch"):
        score_pairs(down, pairs_of(300))
    assert len(down.seen) == 2 + 16
    with pytest.raises(RewardError, match="aa is too long"):
        score_pairs(Picky(refuses=["aa", "aaa"]), pairs_of(2))
    last = Picky(refuses=["a" * n for n in range(298, 400)])  # the last batch is small: these are rows, not the reward
    assert score_pairs(last, pairs_of(300)).failed == [296, 297, 298, 299]
    assert score_pairs(Picky(refuses=["a" * n for n in range(15)]), pairs_of(300)).failed == list(range(13))


def test_a_reward_that_refuses_batches_but_no_pair_is_an_error():
    with pytest.raises(RewardError, match="512 are too many"):
        score_pairs(Picky(limit=2), pairs_of(300))
