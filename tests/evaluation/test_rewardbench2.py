"""RewardBench 2: its rows are read as published, and its score is that of its own code, written anew."""

import json
import math
import random

import numpy as np
import pytest
import torch
from datasets import Dataset

from align.errors import DataError
from align.evaluation import pair_scores
from align.evaluation.reward_eval import evaluate_reward
from align.evaluation.reward_page import print_reward_eval
from align.evaluation.reward_plots import by_chance
from align.evaluation.rewardbench2 import PROMPTS, TIES
from align.reward_models.base import Reward, RewardOutput


def published(subset, number, right, wrong):
    """A row as the hub has it. An answer begins with its score, so that a reward can read it."""
    return {
        "id": number,
        "prompt": f"Question {subset} {number}?",
        "chosen": [f"{score} right {i}" for i, score in enumerate(right)],
        "rejected": [f"{score} wrong {i}" for i, score in enumerate(wrong)],
        "num_correct": len(right),
        "num_incorrect": len(wrong),
        "total_completions": len(right) + len(wrong),
        "models": ["one", "two"],
        "subset": subset,
        "additional_metadata": {"category": None if subset == TIES else "x"},
    }


def rows_of(draw, questions=6, size=3):
    rows, scores = [], list(range(1, 7))
    for subset in PROMPTS:
        if subset != TIES:
            rows += [
                published(subset, f"{subset}{i}", [draw.choice(scores)], draw.sample(scores, 3)) for i in range(size)
            ]
    for number in range(questions):
        rows.append(published(TIES, f"ref:{number}", [draw.choice(scores)], draw.sample([-4, -2, 0, 2, 4], 4)))
        right = draw.choices(scores, k=draw.randint(2, 4))
        rows.append(published(TIES, f"tied:{number}", right, draw.sample([-4, -2, 0, 2], 3)))
    draw.shuffle(rows)
    return rows


class Reads(Reward):
    """The number that an answer begins with; NaN, which is refused, from `limit` on. asked: of which answers."""

    name = "reads"

    def __init__(self, limit=99):
        self.limit, self.asked, self.chat = limit, [], None

    def _score(self, batch):
        self.chat = not isinstance(batch.completions[0], str)
        texts = [text[-1]["content"] if self.chat else text for text in batch.completions]
        self.asked += [(str(prompt), text) for prompt, text in zip(batch.prompts, texts, strict=True)]
        found = [float(text.split()[0]) for text in texts]
        return RewardOutput(torch.tensor([score if score < self.limit else math.nan for score in found]))


def evaluate(rows, reward=None, **options):
    return evaluate_reward([reward or Reads()], Dataset.from_list(rows), rewrites="none", **options)


def of_the_benchmark(rows):
    """{subset: score} as rewardbench/utils.py computes it."""
    found, by_id = {}, {}
    for row in rows:
        right, wrong = ([float(text.split()[0]) for text in row[name]] for name in ("chosen", "rejected"))
        if row["subset"] == TIES:
            by_id[row["id"]] = (right, min(right) - max(wrong))
        else:
            top = max(right + wrong)
            found.setdefault(row["subset"], []).append((right + wrong).count(top) ** -1 if right[0] == top else 0)
    found = {name: sum(values) / len(values) for name, values in found.items()}
    accuracy = {
        kind: np.mean([gap > 0 for name, (_, gap) in by_id.items() if name.startswith(kind)])
        for kind in ("ref", "tied")
    }
    numbers = [name.split(":")[1] for name in by_id if name.startswith("ref") and "tied" + name[3:] in by_id]
    above, both, margins = [], [], []
    for number in numbers:
        right, gap = by_id[f"tied:{number}"]
        spread, least = max(right) - min(right), min(gap, by_id[f"ref:{number}"][1])
        above.append(gap > spread)
        both.append(least > spread)
        margins.append(math.tanh(least / spread - 1) if spread else (least > 0) - (least < 0))
    score = 0.3 * accuracy["tied"] + 0.3 * accuracy["ref"] + 0.2 * np.mean(above) + 0.2 * np.mean(both)
    return {**found, TIES: score + 0.01 * np.mean(margins)}


@pytest.mark.parametrize("seed", range(4))
def test_the_score_is_that_of_its_own_code(seed):
    rows = rows_of(random.Random(seed))
    entry = evaluate(rows)["rewards"]["reads"]["rewardbench"]
    expected = of_the_benchmark(rows)
    assert {name: part["value"] for name, part in entry["sections"].items()} == pytest.approx(expected)
    assert list(entry["sections"]) == list(PROMPTS) and entry["sections"][TIES]["prompts"] == 12
    assert entry["score"]["value"] == pytest.approx(sum(expected.values()) / 6)
    assert entry["score"]["low"] < entry["score"]["value"] < entry["score"]["high"]
    assert entry["score"]["prompts"] == len(rows) and entry["sections"]["Math"]["prompts"] == 3


def test_by_hand(tmp_path, capsys):
    rows = [
        published("Math", "0", [5], [1, 2, 3]),  # 1
        published("Math", "1", [3], [3, 3, 1]),  # 1/3
        published("Math", "2", [3], [3, 4, 1]),  # 0
        published(TIES, "ref:0", [5], [2, 1]),  # right, gap 3
        published(TIES, "tied:0", [6, 8], [1, 0]),  # right, gap 5 > spread 2; the smaller gap 3 too: tanh(1/2)
        published(TIES, "ref:1", [1], [2, 1]),  # wrong, gap -1
        published(TIES, "tied:1", [4, 4], [1, 0]),  # right, gap 3 > spread 0; the smaller gap -1 is not: -1
    ]
    (tmp_path / "bench.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = evaluate_reward([Reads()], tmp_path / "bench.jsonl", rewrites="none", output_dir=tmp_path)
    entry = found["rewards"]["reads"]["rewardbench"]
    assert entry["sections"]["Math"]["value"] == pytest.approx(4 / 9)
    parts = {name: part["value"] for name, part in entry["ties"].items()}
    margin = (math.tanh(0.5) - 1) / 2
    assert list(parts.values()) == pytest.approx([1, 0.5, 1, 0.5, margin])
    assert entry["sections"][TIES]["value"] == pytest.approx(0.3 + 0.15 + 0.2 + 0.1 + 0.01 * margin)
    assert entry["score"] is None  # four subsets are not there
    assert "not RewardBench 2 as published: Factuality has 0 of 475 prompts" in found["notes"][0]
    assert found["setup"]["pairs"] == 9 + 2 + 4 + 2 + 4 and found["setup"]["rows"] == 7
    page = (tmp_path / "reward_eval.html").read_text()
    assert "<h3>RewardBench 2</h3>" in page and "the line is chance: one of four answers" in page
    assert by_chance(found["rewards"]) == 0.25
    print_reward_eval(found)
    assert "RewardBench 2 (k answers that share" in capsys.readouterr().out


@pytest.mark.parametrize("at_once", [256, 7])
def test_each_answer_is_scored_once_and_as_a_message(at_once, monkeypatch):
    monkeypatch.setattr(pair_scores, "PAIRS_AT_ONCE", at_once)
    rows = rows_of(random.Random(0))
    reward = Reads()
    evaluate(rows, reward)
    assert reward.chat and len(reward.asked) == len(set(reward.asked)) == sum(row["total_completions"] for row in rows)


def test_a_row_is_left_out_whole():
    rows = [published("Math", str(i), [5], [1, 2, 3]) for i in range(9)] + [published("Math", "9", [5], [1, 50, 2])]
    with pytest.raises(DataError, match=r"1 of 10 rows cannot be used .*'reads' refuses it .*\(row 9\)"):
        evaluate(rows, Reads(limit=40))
    found = evaluate(rows, Reads(limit=40), max_bad_share=0.1)
    assert (
        found["setup"]["pairs"] == 27 and found["rewards"]["reads"]["rewardbench"]["sections"]["Math"]["prompts"] == 9
    )
    assert list(found["setup"]["dropped"].values()) == [1]


def test_ties_without_one_of_a_question_has_no_score():
    rows = [
        published("Math", "0", [5], [1, 2, 3]),
        published(TIES, "ref:0", [5], [1]),
        published(TIES, "tied:1", [5, 6], [1]),
    ]
    entry = evaluate(rows)["rewards"]["reads"]["rewardbench"]
    assert entry["sections"][TIES]["value"] is None and entry["ties"]["ref_accuracy"]["value"] == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"chosen": []}, "chosen is not a list of texts"),
        ({"rejected": None}, "rejected is not a list of texts"),
        ({"num_incorrect": 4}, "num_incorrect is not the number of answers in rejected"),
        ({"chosen": ["1 a", "2 a"], "num_correct": 2}, "chosen has several answers"),
        ({"subset": TIES}, "id of a prompt of Ties is not ref:N or tied:N"),
        ({"subset": TIES, "id": "ref:0"}, "id of a prompt of Ties is another's too"),
        ({"subset": TIES, "id": "tied:0"}, "chosen of a tied prompt has one answer"),
        ({"subset": None}, "subset is missing"),
    ],
)
def test_bad_rows_are_named(change, reason):
    good = published("Math", "0", [5], [1, 2, 3])
    rows = [good, published(TIES, "ref:0", [5], [1]), {**published("Math", "1", [5], [1, 2, 3]), **change}]
    with pytest.raises(DataError, match=rf"{reason}.*\(row 2\)"):
        evaluate(rows)
