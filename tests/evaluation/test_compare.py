"""`align compare`: win rates against numbers counted by hand, position swap, ties, length control, the page."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from align.cli.main import main
from align.errors import ConfigError, DataError, RewardError
from align.evaluation.answers import _resume
from align.evaluation.compare import by_judge, by_scores, paired, summarise
from align.reward_models.build import build_reward


def answers(path, texts, samples=1) -> str:
    lines = [
        {"row": i // samples, "sample": i % samples, "prompt": f"question {i // samples}", "completion": text}
        for i, text in enumerate(texts)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def pairs_of(a, b):
    return [
        ({"row": i, "prompt": "p", "completion": x}, {"completion": y})
        for i, (x, y) in enumerate(zip(a, b, strict=True))
    ]


def test_a_file_against_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.py").write_text(
        "def good(prompts, completions, **_):\n    return [float(c.count('good')) for c in completions]\n"
        "def longer(prompts, first, second):\n"
        "    return ['first' if len(a) > len(b) else 'second' if len(b) > len(a) else 'tie'"
        " for a, b in zip(first, second)]\n"
        "def lazy(prompts, first, second):\n    return ['first'] * len(first)\n"
    )
    a = answers(tmp_path / "a.jsonl", ["good <b>one</b>", "good", "bad", "good good"], samples=2)
    b = answers(tmp_path / "b.jsonl", ["bad", "good", "good one", "good"], samples=2)
    assert main(["compare", a, b, "--rewards", "my.py:good", "--judge", "my.py:longer", "my.py:lazy"]) == 0
    result = json.loads((tmp_path / "outputs/compare/compare.json").read_text())
    assert result["pairs"] == 4 and result["prompts"] == 2 and result["longer"] == 0.5
    good = result["by"]["good"]
    assert good["preference"] == [1, 0.5, 0, 1] and good["win_rate"]["value"] == 0.625 and good["ties"] == 0.25
    assert good["win_rate"]["low"] == 0.5 and good["win_rate"]["high"] == 0.75  # two prompts: 0.75 and 0.5
    longer, lazy = result["by"]["longer"], result["by"]["lazy"]
    assert longer["preference"] == [1, 0.5, 0, 1] and longer["consistent"] == 1
    assert lazy["preference"] == [0.5] * 4 and lazy["consistent"] == 0  # only a position is preferred: ties
    page = (tmp_path / "outputs/compare/compare.html").read_text()
    assert "good &lt;b&gt;one&lt;/b&gt;" in page and "question 1" in page
    assert "http" not in page.replace(
        "http://www.w3.org/2000/svg", ""
    )  # the name of SVG's elements, which nobody fetches
    assert "good: A wins 62.5% (50.0% to 75.0%)" in capsys.readouterr().out


def test_the_same_answer_twice_is_a_tie():
    pairs = pairs_of(["same", "same", "a"], ["same", "same", "b"])
    pairs[0][1]["finish_reason"] = "length"  # which a reward may look at
    assert by_scores(pairs, [1 + 1e-7, 1 + 1e-7, 1 + 1e-7], [1.0] * 3).tolist() == [1, 0.5, 1]


def test_a_side_that_wins_all_is_not_certain_to():
    pairs = [({"row": i // 2, "completion": "aa"}, {"row": i // 2, "completion": "b"}) for i in range(20)]
    for preference in (1.0, 0.0):
        found = summarise(pairs, np.full(20, preference))["win_rate"]
        assert found["value"] == pytest.approx(preference)
        assert found["high"] - found["low"] == pytest.approx(1 - 0.025 ** (1 / 10))


def test_length_control_takes_out_what_length_explains():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 60, size=(2, 400))
    pairs = pairs_of(["x" * n for n in lengths[0] + 10], ["x" * n for n in lengths[1]])
    difference = np.array([len(a["completion"]) - len(b["completion"]) for a, b in pairs])
    by_length = summarise(pairs, (rng.random(400) < 1 / (1 + np.exp(-difference / 10))).astype(float))
    assert by_length["win_rate"]["low"] > 0.55
    assert by_length["at_equal_length"]["low"] < 0.5 < by_length["at_equal_length"]["high"]
    by_merit = summarise(pairs, (rng.random(400) < 0.7).astype(float))
    assert by_merit["at_equal_length"]["value"] == pytest.approx(by_merit["win_rate"]["value"], abs=0.03)
    assert summarise(pairs, np.ones(400))["at_equal_length"]["value"] > 0.95


def test_mistakes(tmp_path, capsys):
    a, b = answers(tmp_path / "a.jsonl", ["x", "y"]), answers(tmp_path / "b.jsonl", ["x"])
    assert main(["compare", a, b]) == 2 and "name who decides" in capsys.readouterr().err
    assert main(["compare", a, b, "--rewards", "align.data.toy:gold"]) == 2
    assert "the two have answers to other rows: 2 and 1" in capsys.readouterr().err
    assert main(["compare", a, "model", "--rewards", "align.data.toy:gold"]) == 2
    assert "name --prompts for it" in capsys.readouterr().err
    assert main(["compare", a, a, "--rewards", "align.data.toy:gold", "--temperature", "0.3", "--prompts", "p"]) == 2
    assert "--temperature, --prompts says how answers are drawn" in capsys.readouterr().err
    for change, said in (
        ({"row": None}, "answers of A lack row or sample"),
        ({}, "two answers of A have the same row"),
    ):
        with pytest.raises(DataError, match=said):
            paired([{"row": 0, "sample": 0, "prompt": "p"}, {"row": 0, "sample": 0, "prompt": "p", **change}], [])
    halves, alike = by_judge(pairs_of(["x"], ["y"]), lambda prompts, first, second: np.float32([0.5]), "j")
    assert halves == [0.5] and alike == 1
    with pytest.raises(RewardError, match="'j', pair 0: expected 'first', 'second', 'tie' or a probability, got 2"):
        by_judge(pairs_of(["x"], ["y"]), lambda prompts, first, second: [2], "j")


def test_what_is_no_judge_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.py").write_text(
        "def two(prompts, first): ...\ndef four(prompts, first, second, model): ...\ndef nothing(*lists): ...\n"
    )
    command = ["compare", answers(tmp_path / "a.jsonl", ["x"]), answers(tmp_path / "b.jsonl", ["y"]), "--judge"]
    for judge, said in (
        ("my.py:two", "my.py:two(prompts, first): too many positional arguments. It is called with three lists"),
        ("my.py:four", "my.py:four(prompts, first, second, model): missing a required argument: 'model'"),
        ("{function: my.py:two}", "my.py:two(prompts, first): too many positional arguments"),
        ("my.py:nothing", "judge 'nothing' returned NoneType, not a list with a verdict for each pair"),
    ):
        assert main([*command, judge]) == 2
        assert said in " ".join(capsys.readouterr().err.split())
    with pytest.raises(ConfigError, match=r"<lambda>\(prompts\): too many positional"):
        build_reward({"type": "judge", "function": lambda prompts: []})


def test_judges_of_one_name_are_told_apart(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, verdict in (("one", "first"), ("two", "tie")):
        (tmp_path / f"{name}.py").write_text(f"def judge(prompts, a, b):\n    return [{verdict!r}] * len(a)\n")
    (tmp_path / "three.py").write_text("def judge(prompts, completions, **_):\n    return [1.0] * len(completions)\n")
    command = ["compare", answers(tmp_path / "a.jsonl", ["x"]), answers(tmp_path / "b.jsonl", ["y"])]
    for options, names in (
        (["--judge", "one.py:judge", "two.py:judge"], ["one.py:judge", "two.py:judge"]),
        (["--judge", "one.py:judge", "--rewards", "three.py:judge"], ["judge", "one.py:judge"]),
        (["--judge", "one.py:judge"], ["judge"]),
    ):
        assert main([*command, *options]) == 0
        assert sorted(json.loads((tmp_path / "outputs/compare/compare.json").read_text())["by"]) == names
        assert len(capsys.readouterr().out.splitlines()) == len(names) + 1
    assert main([*command, "--judge", "one.py:judge", "one.py:judge"]) == 2
    assert "the judge one.py:judge is given twice" in capsys.readouterr().err


@pytest.mark.parametrize("line, said", [
    ({"prompt": "p", "completion": None}, "line 2: an answer has a prompt"),
    ({"prompt": [{"role": "user"}], "completion": "x"}, "line 2: an answer has a prompt"),
    ([1], "line 2: no JSON object"),
])  # fmt: skip
def test_damaged_answers_are_named(tmp_path, capsys, line, said):
    a, b = answers(tmp_path / "a.jsonl", ["x"]), str(tmp_path / "b.jsonl")
    assert main(["compare", a, b, "--rewards", "align.data.toy:gold"]) == 2
    assert "b.jsonl does not exist" in capsys.readouterr().err
    answers(tmp_path / "b.jsonl", ["y"])
    with open(b, "a") as file:
        file.write(json.dumps(line) + "\n")
    assert main(["compare", a, b, "--rewards", "align.data.toy:gold"]) == 2
    assert f"b.jsonl, {said}" in capsys.readouterr().err


@pytest.mark.parametrize("line, said", [
    (b"{", "line 1: not valid JSON"), (b"\xff", "line 1: not valid JSON"), (b"{}", "line 1 is not sample 0 of row 0"),
])  # fmt: skip
def test_a_damaged_file_is_not_resumed(tmp_path, line, said):
    output = tmp_path / "a.jsonl"
    assert _resume(output, {"n": 1}, [0, 1], 1) == 0
    output.write_bytes(line + b"\n")
    with pytest.raises(DataError, match=f"a.jsonl, {said}"):
        _resume(output, {"n": 1}, [0, 1], 1)
    output.with_suffix(".identity.json").write_text("{")
    with pytest.raises(DataError, match="a.identity.json: not valid JSON"):
        _resume(output, {"n": 1}, [0, 1], 1)


def test_a_file_of_answers_is_replaced_by_one_that_is_on_the_disk(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda opened: (events.append("flushed"), fsync(opened)))
    monkeypatch.setattr(os, "replace", lambda old, new: (events.append(Path(new).name), replace(old, new)))
    output = tmp_path / "answers.jsonl"
    assert _resume(output, {"n": 1}, [0, 1], 1) == 0
    output.write_text('{"row": 0, "sample": 0}\n{"row": 1, "sam')
    assert _resume(output, {"n": 1}, [0, 1], 1) == 1
    assert events == ["flushed", "answers.identity.json", "flushed", "answers.jsonl"]
    assert output.read_text() == '{"row": 0, "sample": 0}\n'
