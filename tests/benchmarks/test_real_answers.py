"""The study on real answers: its pairs, its curves, and the page's numbers."""

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.real_answers import curves, judged_pairs

ROOT = Path(__file__).parents[2]


def answers(instructions: int = 6) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = [
        (f"question {i}", f"answer {i} {j}", round(rng.random(), 1)) for i in range(instructions) for j in range(32)
    ]
    return pd.DataFrame(rows, columns=["prompt", "completion", "gold"])


def test_the_judges_better_answer_to_the_same_instruction_is_chosen():
    gold = {row.completion: row.gold for row in answers().itertuples()}
    pairs = judged_pairs(answers(), 50)
    assert len(pairs) == 50
    for pair in pairs:
        better, worse = (pair[side][0]["content"] for side in ("chosen", "rejected"))
        assert gold[better] > gold[worse] and better.split()[1] == worse.split()[1]
        assert pair["prompt"] == [{"role": "user", "content": f"question {better.split()[1]}"}]


def test_what_chooses_by_gold_is_the_gold_curve():
    table = answers()
    table["prompt_id"], table["length"] = table.prompt.factorize()[0], 1 - table.gold
    for i in range(2):
        table[f"judged_{i}"] = table.gold * (i + 1) + i
    found = curves(table, ["judged"], 2)
    best = table.groupby("prompt").gold.max().mean()
    for name in ("gold", "judged, one", "judged, mean", "judged, wco"):
        assert found[name]["gold"] == found["gold"]["gold"] and abs(found[name]["gold"][-1] - best) < 1e-4
    assert abs(found["length"]["gold"][-1] - table.groupby("prompt").gold.min().mean()) < 1e-4
    assert found["gold"]["instructions"] == 6 and found["gold"]["n"] == [1, 2, 4, 8, 16, 32]


def test_the_page_has_the_numbers_of_the_result():
    result = json.loads((ROOT / "benchmarks" / "results" / "real_answers.json").read_text())
    found = result["curves"]
    page = (ROOT / "docs" / "overoptimization.md").read_text().partition("## On real answers")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \[([\d.]+), ([\d.]+)\] \|$", page, re.MULTILINE)
    names = {
        "one reward model": "judged, one",
        "four, mean": "judged, mean",
        "four, worst case": "judged, wco",
        "four, uncertainty-weighted": "judged, uwo:0.5",
        "the longest answer": "length",
        "the judge itself": "gold",
    }
    assert [row[0] for row in rows] == list(names)
    for name, *shown in rows:
        curve = found[names[name]]
        given = [curve["gold"][0], curve["gold"][2], curve["gold"][-1], *curve["gold_95"][-1]]
        assert shown == [f"{value:.3f}" for value in given], name
    assert f"{found['length']['instructions']} instructions" in page
    assert f"{100 * result['accuracy']['judged']:.0f} % right" in page
