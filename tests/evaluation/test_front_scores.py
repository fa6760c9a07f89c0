"""`align front`: scores, KL and comparisons of the policies of fronts."""

import argparse
import json
import re

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from align.cli.front import read_fronts
from align.cli.main import main
from align.data import toy
from align.evaluation import interactive
from align.evaluation.front import Front, Point, read_front, write_front
from align.evaluation.front_plots import plot_fronts
from align.evaluation.front_scores import REFERENCE, PolicyScores, summarise
from align.modeling.load import load_policy
from tests.modeling.tiny import causal

TOKENIZER = toy.tokenizer()
REWARDS = """
def words(completions, **_):
    return [len(text.split()) for text in completions]

def early(completions, **_):
    return [-sum(map(ord, text)) / 1000 for text in completions]
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A reference, a front of two adapters, a whole model, prompts, and two rules."""
    folder = tmp_path_factory.mktemp("front_world")
    causal(seed=0, dtype=torch.float32, vocab_size=len(TOKENIZER), eos_token_id=2).save_pretrained(folder / "base")
    causal(seed=1, dtype=torch.float32, vocab_size=len(TOKENIZER), eos_token_id=2).save_pretrained(folder / "other")
    points = []
    for number, weight in enumerate((0.8, 0.2)):
        torch.manual_seed(number)
        lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(load_policy(folder / "base"), lora)
        for values in model.parameters():
            values.data *= 0.3 if values.requires_grad else 1
        model.save_pretrained(folder / "run" / f"w_{number}")
        points.append(Point(f"w_{number}", f"w_{number}", {"words": weight, "early": 1 - weight}, seconds=1.5))
    for name in ("base", "other", "run/w_0", "run/w_1"):
        TOKENIZER.save_pretrained(folder / name)
    write_front(
        Front("modpo", str(folder / "base"), ["words", "early"], points, {"margin rewards": 0.5}), folder / "run"
    )
    Dataset.from_list(toy.split_prompts(0, 12)[0]).to_json(folder / "prompts.jsonl")
    (folder / "rules.py").write_text(REWARDS)
    return folder


def front(world, *tokens, rewards=("words", "early")) -> int:
    given = ["--prompts", str(world / "prompts.jsonl"), "--backend", "transformers"]
    specs = [f"{world}/rules.py:{name}" for name in rewards]
    return main(["front", str(world / "run"), *map(str, tokens), *given, "--rewards", *specs])


def test_scores_and_figure(world, tmp_path, capsys):
    assert front(world, world / "other", "--n", 3, "--max_completion_length", 5, "--output_dir", tmp_path) == 0
    summary = json.loads((tmp_path / "scores.json").read_text())
    assert summary["objectives"] == ["words", "early"] and list(summary["runs"]) == ["run", "other"]
    assert summary["reference"]["kl"]["mean"] == 0
    completions = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert len(completions) == 4 * 12
    for entry in completions:
        assert entry["words"] == len(entry["completion"].split())
    points = summary["runs"]["run"]["points"]
    assert [point["weights"]["words"] for point in points] == [0.8, 0.2]
    assert summary["runs"]["run"]["seconds"] == {"margin rewards": 0.5, "training": 3.0}
    for entry in (summary["reference"], *points):
        words = entry["scores"]["words"]
        assert 0 <= words["low"] <= words["mean"] <= words["high"] <= 5 + 1e-9
    assert (tmp_path / "front.png").stat().st_size > 10_000
    out = capsys.readouterr().out
    assert "words early" in out  # whose weights the first columns are
    assert "hypervolume" in out and "reference" in out
    again = tmp_path / "again"
    assert front(world, world / "other", "--n", 3, "--max_completion_length", 5, "--output_dir", again) == 0
    assert json.loads((again / "scores.json").read_text())["runs"]["run"]["points"] == points


def test_runs_whose_weights_stand_in_another_order(world, tmp_path, monkeypatch):
    """A point's first weight is of one objective in all runs; one policy is one reference, however it is named."""
    monkeypatch.chdir(world)
    for name, order, reference in (("a", ("x", "y"), "base"), ("b", ("y", "x"), str(world / "base"))):
        points = [Point("p", "p", dict(zip(order, (0.7, 0.3), strict=True)))]
        write_front_in(tmp_path / name, Front("modpo", reference, list(order), points))
    write_front_in(tmp_path / "c", Front("modpo", "base", ["z"], [Point("p", "p", {"z": 1.0})]))

    def weights(*runs) -> list[list]:
        args = argparse.Namespace(runs=[str(tmp_path / run) for run in runs], names=None, reference=None)
        return [list(front.points[0].weights.items()) for front in read_fronts(args).values()]

    assert weights("a", "b") == [[("x", 0.7), ("y", 0.3)], [("x", 0.3), ("y", 0.7)]]
    assert weights("b", "c") == [[("y", 0.7), ("x", 0.3)], [("z", 1.0)]]


def test_a_single_policy_stands_at_no_weight():
    point = Point("w", "w", {"a": 0.7, "b": 0.3})
    fronts = {"run": Front("modpo", "", ["a", "b"], [point]), "one": Front("policy", "", [], [Point("p", "p", {})])}
    found = {REFERENCE: scores((0, 0)), "run": scores((3, 0)), "one": scores((1, 1))}
    found["one"][0].kl += 2.0
    summary = summarise(fronts, found, ["a", "b"])
    of_run, of_one = interactive.fronts(summary)[-1]["curves"]
    assert of_run["x"] == [0.7] and (of_one["x"], of_one["y"]) == ([0, 1], [2.0, 2.0])
    *_, axis = (axis for axis in plot_fronts(summary).axes if axis.get_xlabel().startswith("weight"))
    (line,) = (line for line in axis.lines if line.get_linestyle() == ":")
    assert list(line.get_ydata()) == [2.0, 2.0] and line.get_label() == "one"


def write_front_in(folder, front: Front) -> None:
    folder.mkdir()
    write_front(front, folder)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_kl_is_that_of_the_policies(world, tmp_path, temperature):
    """Of completions of one token, the KL is known from the two distributions."""
    options = ["--n", 256, "--max_completion_length", 1, "--temperature", temperature]
    front(world, *options, "--output_dir", tmp_path)
    summary = json.loads((tmp_path / "scores.json").read_text())
    reference = load_policy(world / "base")
    rows = [json.loads(line)["prompt"] for line in (world / "prompts.jsonl").read_text().splitlines()]
    for point in summary["runs"]["run"]["points"]:
        policy, exact = load_policy(point["folder"]), []
        for prompt in rows:
            ids = torch.tensor([TOKENIZER(prompt)["input_ids"]])
            with torch.no_grad():
                new, old = ((model(ids).logits[0, -1] / temperature).log_softmax(-1) for model in (policy, reference))
            exact.append((new.exp() * (new - old)).sum().item())
        assert point["kl"]["mean"] == pytest.approx(np.mean(exact), abs=0.04) and np.mean(exact) > 0.08


def scores(*means: tuple[float, float], prompts=50, spread=0.0) -> list[PolicyScores]:
    rng = np.random.default_rng(1)
    zeros = np.zeros(prompts)
    return [PolicyScores(np.array(m) + spread * rng.normal(size=(prompts, 2)), zeros, zeros, []) for m in means]


def test_comparison_of_two_runs():
    def made(*weights):
        return Front("modpo", "", ["a", "b"], [Point(f"{w}", f"{w}", {"a": w, "b": 1 - w}) for w in weights])

    fronts = {"good": made(0.9, 0.5, 0.1), "bad": made(0.5, 0.1)}
    found = {REFERENCE: scores((0, 0)), "good": scores((3, 0), (2, 2), (0, 3)), "bad": scores((1, 1), (0, 2.5))}
    summary = summarise(fronts, found, ["a", "b"])
    assert summary["reference_point"] == [0, 0]
    assert summary["runs"]["good"]["hypervolume"]["mean"] == 4  # (3, 0) and (0, 3) are on the axes
    assert summary["runs"]["bad"]["hypervolume"]["mean"] == 1
    assert [p["dominated_share"]["good"] for p in summary["runs"]["bad"]["points"]] == [1, 1]
    assert [p["dominated_share"]["bad"] for p in summary["runs"]["good"]["points"]] == [0, 0, 0]
    lower = summarise(fronts, found, ["a", "b"], reference_point=[-1, -1])
    assert lower["runs"]["good"]["hypervolume"]["mean"] == 4 * 1 + 3 * 2 + 1 * 1
    assert lower["reference_point_is"] == "given"
    noisy = {**found, "bad": scores((2, 2.02), (0, 2.5), spread=1.0)}
    share = summarise(fronts, noisy, ["a", "b"])["runs"]["bad"]["points"][0]["dominated_share"]["good"]
    assert 0 < share < 1  # too close to call


@pytest.mark.parametrize(
    ("tokens", "rewards", "message"),
    [
        ([], ("words",), "at least two objectives"),
        (["--names", "a", "b"], ("words", "early"), "2 names for 1 runs"),
        (["--reference_point", "1"], ("words", "early"), "--reference_point gives 1 numbers for 2 rewards"),
        (["NOWHERE"], ("words", "early"), "holds no front.json.*or that of a saved policy"),
        (["--temperature", "0"], ("words", "early"), "must be above 0"),
        (["--reference_point", "nan", "1"], ("words", "early"), "--reference_point: finite numbers, got"),
        (["--names", "reference"], ("words", "early"), "'reference' is taken"),
        (["--reference", "OTHER", "--num_prompts", "2", "--max_completion_length", "2"], ("words", "early"), None),
    ],
)
def test_what_is_refused(world, tmp_path, capsys, tokens, rewards, message):
    places = {"NOWHERE": tmp_path / "nothing", "OTHER": world / "other"}
    status = front(world, *(places.get(t, t) for t in tokens), "--output_dir", tmp_path, rewards=rewards)
    if message is None:
        assert status == 0
        return
    error = capsys.readouterr().err
    assert status == 2 and re.search(message, error), error


def test_a_file_that_lists_no_points(tmp_path):
    from align.errors import DataError

    for text in ("{", "[]", '{"points": [{"name": 1}]}'):
        (tmp_path / "front.json").write_text(text)
        with pytest.raises(DataError, match="is no list of a front's points"):
            read_front(tmp_path)
