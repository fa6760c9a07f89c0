"""`evaluate_reward` and `align reward-eval`: every number on small cases that are worked out another way."""

import argparse
import json
import re

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset

from align.cli import reward_eval as command
from align.errors import AlignError, ConfigError, DataError
from align.evaluation.reward_eval import evaluate_reward
from align.evaluation.rewardbench import PAIRS
from align.evaluation.rewrites import REWRITES
from align.reward_models.rules import RuleReward
from tests.evaluation.pages import figures_of

WORDS = ("wave", "calm", "salt", "reef", "foam", "tide")
RULES = """
def longest(completions, **_):
    return [float(len(t)) for t in completions]

def waves(completions, **_):
    return [float(t.count("wave")) for t in completions]

def capital(completions, **_):
    return [float(t.lstrip()[:1].isupper()) + 0.01 * t.count("wave") for t in completions]

def constant(completions, **_):
    return [1.0 for _ in completions]

def messages(completions, **_):
    return [float(len(t[0]["content"])) for t in completions]

def short_only(completions, **_):
    return [0.0 if len(t) < 60 else float("nan") for t in completions]
"""


def make_pairs(n=120, seed=0):
    """The chosen answer has more waves, and is longer in 3 of 4 pairs."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        chosen, rejected = (" ".join(rng.choice(words, 6)) for words in (WORDS, WORDS[1:]))
        chosen = f"The wave wave wave {chosen}"
        rejected = f"The {rejected}" + (" and so on, and so on, and so on" if i % 4 == 0 else "")
        rows.append({"prompt": f"What about sea {i % 100}?", "chosen": chosen, "rejected": rejected})
    return rows


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    (folder / "rules.py").write_text(RULES)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_pairs()))
    return folder


def rule(world, name):
    return f"{world}/rules.py:{name}"


@pytest.fixture(scope="module")
def result(world):
    specs = [rule(world, name) for name in ("longest", "waves", "capital")]
    return evaluate_reward(specs, world / "pairs.jsonl", output_dir=world / "out", seed=3)


def test_accuracy_and_length_of_a_reward_that_is_pure_length(result):
    pairs = make_pairs()
    lengths = np.array([[len(row["chosen"]), len(row["rejected"])] for row in pairs])
    accuracy = np.mean((np.sign(lengths[:, 0] - lengths[:, 1]) + 1) / 2)
    entry, baseline = result["rewards"]["longest"], result["baselines"]["the longer answer"]
    assert entry["accuracy"]["value"] == pytest.approx(accuracy) and 0.6 < accuracy < 0.9
    assert entry["accuracy"]["low"] < accuracy < entry["accuracy"]["high"] and entry["accuracy"]["pairs"] == 120
    assert entry["accuracy"] == baseline["accuracy"] and entry["by_length"] == baseline["by_length"]
    assert entry["length"]["prefers_longer"] == 1 and entry["length"]["pearson"] == pytest.approx(1)
    assert entry["by_length"]["chosen_longer"]["value"] == 1 and entry["by_length"]["chosen_shorter"]["value"] == 0
    bins = entry["by_length"]["bins"]
    assert sum(part["pairs"] for part in bins) == 120
    assert bins[4]["pairs"] == sum(lengths[:, 0] / lengths[:, 1] >= 2)


def test_a_reward_that_follows_the_meaning_is_told_from_it(result):
    entry = result["rewards"]["waves"]
    assert entry["accuracy"]["value"] == 1 and entry["by_length"]["chosen_shorter"]["value"] == 1
    assert entry["length"]["prefers_longer"] == pytest.approx(entry["length"]["longer_is_chosen"])
    assert entry["calibration"]["best_scale"] is None and entry["calibration"]["unit"] == "the score"
    assert entry["calibration"]["ece"] == pytest.approx(
        np.mean([1 - 1 / (1 + np.exp(-m)) for m in margins("wave")]), abs=1e-9
    )


def margins(word):
    return [row["chosen"].count(word) - row["rejected"].count(word) for row in make_pairs()]


def test_scores_and_histograms(result):
    scores = result["rewards"]["waves"]["scores"]
    found = np.array([[row[side].count("wave") for row in make_pairs()] for side in ("chosen", "rejected")])
    assert scores["mean_chosen"] == pytest.approx(found[0].mean()) and scores["sd"] == pytest.approx(found.std())
    assert scores["mean_margin"] == pytest.approx(np.mean(margins("wave")))
    assert sum(scores["chosen"]) == sum(scores["margins"]) == 120


def test_rewrites_flip_the_reward_that_looks_at_the_surface_only(result):
    surface, meaning = (result["rewards"][name]["rewrites"] for name in ("capital", "waves"))
    assert set(meaning) == {name for name, entry in result["rewrites"].items() if entry["changed"]}
    assert all(entry["flips"]["value"] == 0 and entry["change"]["value"] == 0 for entry in meaning.values())
    case = surface["first_letter_case"]
    assert case["change"]["pairs"] == 120 and case["score_change"]["value"] == pytest.approx(
        -1 / result["rewards"]["capital"]["scores"]["sd"], rel=1e-5
    )
    assert case["flips"]["value"] == 0  # both answers lose the same
    assert set(result["rewrites"]) == set(REWRITES)
    assert result["rewrites"]["list_markers"]["changed"] == 0 and result["rewrites"]["list_markers"]["example"] is None
    example = result["rewrites"]["closing"]["example"]
    assert example["after"].startswith(example["before"])


def test_flips_and_changes_by_hand(world, tmp_path):
    """Sensitive to a full stop: two of the four pairs turn when it goes or comes."""
    (tmp_path / "stop.py").write_text(
        "def stop(completions, **_):\n    return [len(t) / 100 + t.endswith('.') for t in completions]\n"
    )
    rows = {
        "prompt": ["a", "b", "c", "d"],
        "chosen": ["Long answer.", "Yes.", "Longer than that", "Why?"],
        "rejected": ["Short", "Sure.", "No", "How is it?"],
    }
    found = evaluate_reward(f"{tmp_path}/stop.py:stop", Dataset.from_dict(rows), rewrites=["end_punctuation"])
    entry = found["rewards"]["stop"]["rewrites"]["end_punctuation"]
    # before: right, wrong, right (the last pair is not changed). After: "Long answer" < "Short.", "Yes" < "Sure",
    # "Longer than that." > "No."
    assert found["rewrites"]["end_punctuation"]["changed"] == 3
    assert entry["accuracy_before"]["value"] == pytest.approx(2 / 3)
    assert entry["accuracy_after"]["value"] == pytest.approx(1 / 3)
    assert entry["change"]["value"] == pytest.approx(-1 / 3)
    assert entry["flips"]["value"] == pytest.approx(1 / 3)
    scores = [1.12, 0.05, 1.04, 1.05, 0.16, 0.02, 0.04, 0.1]
    moves = [-1.01, 1.01, -1.01, -1.01, 1.01, 1.01]
    assert entry["score_change"]["value"] == pytest.approx(np.mean(moves) / np.std(scores), abs=1e-6)
    assert entry["score_shift"]["value"] == pytest.approx(1.01 / np.std(scores), rel=1e-5)


def test_agreement_of_rewards_and_of_the_members_of_an_ensemble(world):
    members = [rule(world, "longest"), rule(world, "waves")]
    ensemble = {"type": "ensemble", "name": "both", "members": members, "aggregation": "mean"}
    found = evaluate_reward([ensemble, rule(world, "constant")], world / "pairs.jsonl", rewrites="none")
    assert list(found["agreement"]) == ["members of both", "rewards"]
    entry = found["agreement"]["members of both"]
    longer = [np.sign(len(r["chosen"]) - len(r["rejected"])) for r in make_pairs()]
    assert entry["same_ranking"][0][1] == pytest.approx(np.mean([(1 + x) / 2 for x in longer]))
    assert entry["accuracy"] == pytest.approx([entry["same_ranking"][0][1], 1])
    assert entry["all_wrong"] == 0 and len(entry["disagreement"]["bins"]) == 4
    both = found["agreement"]["rewards"]
    assert both["same_ranking"][0][1] == pytest.approx(0.5, abs=0.02) and both["score_correlation"][0][1] is None
    assert "disagreement" not in both
    assert any("constant gives both answers of every pair the same score" in note for note in found["notes"])
    assert found["rewards"]["constant"]["ties"] == 1 and found["rewards"]["constant"]["accuracy"]["value"] == 0.5
    assert found["rewards"]["constant"]["strict_accuracy"]["value"] == 0 and found["rewrites"] == {}


def test_rewardbench_sections(world):
    names = ["alpacaeval-easy", "mt-bench-med", "math-prm", "hep-go"] * 30
    columns = pd.DataFrame(make_pairs()).assign(subset=names)
    columns.loc[columns.subset == "hep-go", ["chosen", "rejected"]] = columns.loc[
        columns.subset == "hep-go", ["rejected", "chosen"]
    ].to_numpy()
    data = Dataset.from_pandas(columns)
    found = evaluate_reward([rule(world, "waves")], data, chat=False, rewrites="none")
    sections = found["rewards"]["waves"]["rewardbench"]["sections"]
    assert list(sections) == ["Chat", "Reasoning"] and sections["Chat"]["value"] == 1
    assert sections["Reasoning"]["value"] == pytest.approx(984 / (984 + 164)) and sections["Reasoning"]["pairs"] == 60
    assert found["rewards"]["waves"]["rewardbench"]["score"] is None
    assert "not RewardBench as published: alpacaeval-easy has 30 of 100 pairs, " in found["notes"][0]
    assert found["notes"][0].endswith("and 20 more")
    assert found["rewards"]["waves"]["subsets"]["hep-go"]["accuracy"]["value"] == 0
    as_chat = evaluate_reward([rule(world, "messages")], data, rewrites="none")
    assert as_chat["setup"]["texts as messages"] is True
    lengths = [len(c) > len(r) for c, r in zip(columns.chosen, columns.rejected, strict=True)]
    assert as_chat["rewards"]["messages"]["strict_accuracy"]["value"] == pytest.approx(np.mean(lengths))


def test_the_whole_rewardbench_has_a_score(world):
    rows = [
        {"prompt": f"{name} {i}", "chosen": "wave" if i % 2 else "none", "rejected": "sea", "subset": name}
        for name in PAIRS
        for i in range(4)
    ]
    found = evaluate_reward([rule(world, "waves")], Dataset.from_list(rows), chat=False, rewrites="none")
    entry = found["rewards"]["waves"]
    # half of each subset is won, half is a tie: lost for RewardBench, half right for the accuracy
    assert entry["rewardbench"]["score"]["value"] == pytest.approx(0.5) and entry["accuracy"]["value"] == 0.75
    assert entry["rewardbench"]["score"]["low"] < 0.5 < entry["rewardbench"]["score"]["high"]
    assert entry["rewardbench"]["score"]["pairs"] == 92


def test_samples_are_the_same_for_every_reward_and_seeded(world):
    options = {"max_pairs": 30, "rewrite_pairs": 10, "rewrites": ["quotes"]}
    specs = [rule(world, "longest"), rule(world, "waves")]
    found = evaluate_reward(specs, world / "pairs.jsonl", **options)
    assert found["setup"]["pairs"] == 30 and found["rewrites"]["quotes"]["changed"] == 10
    again = evaluate_reward(specs, world / "pairs.jsonl", **options)
    other = evaluate_reward(specs, world / "pairs.jsonl", **options, seed=1)

    def numbers(result):
        rewards = {n: {k: v for k, v in e.items() if k != "answers_per_second"} for n, e in result["rewards"].items()}
        return {**{k: v for k, v in result.items() if k != "phases"}, "rewards": rewards}

    assert numbers(found) == numbers(again) != numbers(other)


def test_rows_that_a_reward_refuses_are_bad_rows(world):
    with pytest.raises(DataError, match=r"rows cannot be used .*reward 'short_only' refuses it \(first: .*nan"):
        evaluate_reward(rule(world, "short_only"), world / "pairs.jsonl", rewrites="none")
    specs = [rule(world, "short_only"), rule(world, "waves")]
    found = evaluate_reward(specs, world / "pairs.jsonl", rewrites="none", max_bad_share=0.7)
    kept = sum(len(row["chosen"]) < 60 and len(row["rejected"]) < 60 for row in make_pairs())
    assert 30 < kept < 120
    assert found["setup"]["pairs"] == kept == found["rewards"]["waves"]["accuracy"]["pairs"]
    assert list(found["setup"]["dropped"].values()) == [120 - kept]


@pytest.mark.parametrize(
    ("rewards", "options", "message"),
    [
        (["waves"], {"data": None}, "give preference pairs"),
        ([], {}, "no reward to evaluate"),
        (["waves", "waves"], {}, "two scores are named 'waves'"),
        (["waves"], {"rewrites": ["shout"]}, "no rewrite 'shout'"),
        (["waves"], {"completions": "t.csv", "gold": "waves"}, "two scores are named 'waves'"),
        (["waves"], {"data": None, "completions": "t.csv", "rewrite_pairs": 9}, "rewrite_pairs has no meaning without"),
        (["waves"], {"gold": "truth"}, "gold has no meaning without completions"),
        (["waves"], {"max_bad_share": 1.0}, "max_bad_share must be"),
        (["waves"], {"data": None, "completions": "t.csv", "max_pairs": 9}, "max_pairs has no meaning without data"),
    ],
)
def test_mistakes(world, rewards, options, message):
    options = {"data": world / "pairs.jsonl", **options}
    with pytest.raises(ConfigError, match=message):
        evaluate_reward([rule(world, name) for name in rewards], options.pop("data"), **options)


def test_differences_from_the_first_reward_are_paired(result):
    found = result["comparisons"]
    assert found["base"] == "longest" and list(found["accuracy_minus_base"]) == [
        "waves",
        "capital",
        "the longer answer",
    ]
    difference = found["accuracy_minus_base"]["waves"]
    assert difference["value"] == pytest.approx(1 - result["rewards"]["longest"]["accuracy"]["value"])
    assert 0 < difference["low"] < difference["value"] < difference["high"]
    same = found["accuracy_minus_base"]["the longer answer"]
    assert same["value"] == same["low"] == same["high"] == 0


def test_soft_labels(world):
    rows = pd.DataFrame(make_pairs(40)).assign(chosen_prob=[0.9, 0.7] * 20)
    found = evaluate_reward(rule(world, "waves"), Dataset.from_pandas(rows), rewrites=["quotes"])
    entry = found["rewards"]["waves"]
    assert found["setup"]["soft labels"] is True and entry["accuracy"]["value"] == pytest.approx(0.8)
    assert entry["rewrites"]["quotes"]["accuracy_after"]["value"] == pytest.approx(0.8)
    assert entry["calibration"]["best_scale"] is not None
    rows.loc[3, "chosen_prob"] = 1.5
    with pytest.raises(DataError, match="chosen_prob is not a probability in .0, 1.: 1 .row 3."):
        evaluate_reward(rule(world, "waves"), Dataset.from_pandas(rows), rewrites="none")


def test_one_reward_is_in_memory_at_a_time(world, monkeypatch):
    alive, most = set(), []

    class Counted(RuleReward):
        def __init__(self, function):
            super().__init__(function)
            alive.add(id(self))
            most.append(len(alive))

        def __del__(self):
            alive.discard(id(self))

    monkeypatch.setattr("align.evaluation.reward_eval.build_reward", Counted)
    specs = [rule(world, name) for name in ("longest", "waves", "capital")]
    found = evaluate_reward(specs, world / "pairs.jsonl", rewrites=["quotes"])
    assert list(found["rewards"]) == ["longest", "waves", "capital"] and most == [1, 1, 1]


# ---- outputs --------------------------------------------------------------------------------------------------------


def test_the_page_holds_everything_it_shows(world, result):
    folder = world / "out"
    assert {path.name for path in folder.iterdir()} == {"reward_eval.html", "reward_eval.json", "figures"}
    assert json.loads((folder / "reward_eval.json").read_text()) == json.loads(json.dumps(result))
    page = (folder / "reward_eval.html").read_text()
    rewards = {name: entry for name, entry in result["rewards"].items() if "accuracy" in entry}
    drawn = figures_of(folder / "reward_eval.html")
    assert len(drawn) == 3 + 2 * len(rewards) and "first_letter_case" in page
    for curve, entry in zip(drawn[0]["curves"], rewards.values(), strict=False):
        assert (curve["x"][0], curve["xlow"][0]) == (entry["accuracy"]["value"], entry["accuracy"]["low"])
    for link in re.findall(r'(?:src|href)="([^"]*)"', page):
        assert link.startswith("#"), link
    assert not re.search(r"url\((?!#)", page) and page.count("<script>") == 1 and "{{" not in page
    for name in ("accuracy", "scores", "length", "calibration", "rewrites"):
        assert (folder / "figures" / f"{name}.png").stat().st_size > 5000


def call(*argv):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(item) for item in argv]))


def test_best_of_n_and_a_configuration_file(world, tmp_path, capsys):
    rng = np.random.default_rng(1)
    rows = [
        {"prompt": f"q{i}", "completion": " ".join(rng.choice(WORDS, rng.integers(3, 9))) + f" {j}"}
        for i in range(40)
        for j in range(8)
    ]
    table = pd.DataFrame(rows)
    table["truth"] = table.completion.str.count("wave") + rng.normal(0, 0.1, len(table))
    table.to_csv(tmp_path / "answers.csv", index=False)
    (tmp_path / "run.yaml").write_text(
        f"rewards:\n  - {rule(world, 'waves')}\ngold_reward: {{type: rule, function: '{rule(world, 'longest')}'}}\n"
    )
    argv = ["--completions", tmp_path / "answers.csv", "--gold", "truth", "--output_dir", tmp_path / "out"]
    assert call(tmp_path / "run.yaml", f"{tmp_path}/run.yaml:gold_reward", *argv) == 0
    found = json.loads((tmp_path / "out" / "reward_eval.json").read_text())
    curves = found["best_of_n"]
    assert list(curves) == ["waves", "longest"] and curves["waves"]["n"] == [1, 2, 4, 8]
    best = table.groupby("prompt").truth.max().mean()
    assert curves["waves"]["gold"][0] == pytest.approx(table.truth.mean()) and curves["waves"]["gold"][3] <= best
    assert curves["waves"]["gold"][3] > curves["longest"]["gold"][3]
    frame = table.assign(score=table.completion.str.count("wave"))
    by_prompt = [group[["score", "truth"]].rank().corr().iloc[0, 1] for _, group in frame.groupby("prompt")]
    assert curves["waves"]["rank_correlation"]["value"] == pytest.approx(np.nanmean(by_prompt))
    assert curves["waves"]["rank_correlation"]["value"] > curves["longest"]["rank_correlation"]["value"]
    assert "Best-of-n" in capsys.readouterr().out
    page = (tmp_path / "out" / "reward_eval.html").read_text()
    assert len(figures_of(tmp_path / "out" / "reward_eval.html")) == len(curves) and "Best-of-n against truth" in page


def test_the_command_prints_one_table(world, tmp_path, capsys):
    argv = ["--data", world / "pairs.jsonl", "--rewrites", "quotes", "typos", "--output_dir", tmp_path]
    assert call(rule(world, "longest"), rule(world, "waves"), *argv) == 0
    out = capsys.readouterr().out
    assert "120 pairs" in out and "100.0 %" in out and "the longer" in out
    assert str(tmp_path / "reward_eval.html") in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{type: rule"], "is not a YAML mapping"),
        (["nowhere.yaml"], "no config file nowhere.yaml"),
        (["W/run.yaml:proxies"], "has no 'proxies' to take rewards from .its keys: rewards"),
        (["W/rules.py:waves", "--data", "W/nothing.jsonl"], "no file or folder"),
    ],
)
def test_mistakes_on_the_command_line(world, tmp_path, words, message):
    (world / "run.yaml").write_text("rewards: [rules.py:waves]\n")
    argv = [word.replace("W/", f"{world}/") for word in words]
    argv += [] if "--data" in argv else ["--data", world / "pairs.jsonl"]
    with pytest.raises(AlignError, match=message):
        call(*argv, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()
