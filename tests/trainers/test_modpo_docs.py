"""docs/modpo.md: its commands and Python run as they are written, one after the other, on a tiny policy."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from datasets import Dataset

from align.cli.main import main
from align.data import toy
from align.evaluation.front import read_front
from tests.trainers.tiny_runs import tiny_model

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "modpo.md").read_text(encoding="utf-8")
SHORTER = {"max_steps": 2, "max_length": 32, "per_device_train_batch_size": 8, "report_to": "none", "logging_steps": 1}
RULES = """
def helpful(completions, topic, **_):
    from align.data import toy
    return [toy.helpfulness(t, text) for t, text in zip(topic, completions)]

def short(completions, **_):
    return [-0.5 * len(text.split()) for text in completions]
"""


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", DOCS, re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    text = "\n".join(blocks("bash")).replace("\\\n", " ")
    return [shlex.split(line)[1:] for line in text.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The policy, pairs, prompts and rules that the page names."""
    folder, tokenizer = tmp_path_factory.mktemp("modpo_docs"), toy.tokenizer()
    tiny_model(tokenizer).save_pretrained(folder / "runs" / "sft")
    tokenizer.save_pretrained(folder / "runs" / "sft")
    (folder / "data").mkdir()
    prompts = toy.split_prompts(0, 10)[0]
    Dataset.from_list(prompts).to_json(folder / "data" / "prompts.jsonl")
    answers = toy.reference_text(prompts, 2, 0)
    for objective, score in {"helpful": toy.helpfulness, "short": lambda topic, text: -len(text.split())}.items():
        rows = []
        for pair in zip(answers[::2], answers[1::2], strict=True):
            worse, better = sorted(pair, key=lambda row: score(row["topic"], row["completion"]))
            texts = {"chosen": better["completion"], "rejected": worse["completion"]}
            rows.append({"prompt": better["prompt"], "topic": better["topic"], **texts})
        Dataset.from_list(rows).to_json(folder / "data" / f"{objective}_pairs.jsonl")
    (folder / "my_rewards.py").write_text(RULES)
    (config,) = blocks("yaml")
    (folder / "modpo.yaml").write_text(config + yaml.safe_dump(SHORTER))
    return folder


def test_the_page_runs(world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    shorter = [f"--{key}={value}" for key, value in SHORTER.items()]
    *first, last = commands()
    assert [argv[0] for argv in first] == ["dpo", "modpo", "modpo", "modpo", "front"] and last[0] == "front"
    for argv in first:
        extra = {"dpo": shorter, "front": ["--backend", "transformers"]}.get(argv[0], [])
        assert main([*argv, *extra]) == 0, capsys.readouterr().err
    front = read_front("runs/front")
    assert [point.name for point in front.points][:2] == ["w_1_0", "w_0.75_0.25"] and len(front.points) == 5
    variables: dict = {}
    for number, code in enumerate(blocks("python")):
        exec(compile(code, f"docs/modpo.md, block {number}", "exec"), variables)
    assert len(read_front(variables["folder"]).points) == 3
    assert main([*last, "--backend", "transformers"]) == 0, capsys.readouterr().err
    for name in ("front", "fronts"):
        assert Path("outputs", name, "front.png").exists()


def test_the_table_has_every_metric_of_modpo(world, monkeypatch, tmp_path):
    from align.trainers.modpo import MODPOConfig, MODPOTrainer

    monkeypatch.chdir(world)
    weights = {"preference": 0.5, "short": 0.5}
    args = MODPOConfig(str(tmp_path), weights=weights, use_cpu=True, save_strategy="no", **{**SHORTER, "max_steps": 1})
    trainer = MODPOTrainer("runs/sft", "my_rewards.py:short", args, Dataset.from_json("data/helpful_pairs.jsonl"))
    trainer.train()
    ours = {key for entry in trainer.state.log_history for key in entry if key.startswith(("rewards/", "agreement/"))}
    rows = " ".join(re.findall(r"^\| (`(?:rewards|agreement)/.*?) \|", DOCS, re.MULTILINE))
    assert {re.sub("^agreement/.*", "agreement/<objective>", key) for key in ours} == set(re.findall(r"`(.*?)`", rows))


def test_the_numbers_are_those_of_the_last_measurement():
    result = json.loads((ROOT / "benchmarks" / "results" / "modpo_front.json").read_text())
    summaries = [seed["summary"] for seed in result["seeds"]]
    for label, run in {
        "MODPO": "modpo, no soups",
        "DPO loss weighting": "dpo_lw",
        "soups of two DPO policies": "soups",
    }.items():
        volumes = [summary["runs"][run]["hypervolume"] for summary in summaries]
        shown = [f"{v['mean']:.2f} ({v['low']:.2f}-{v['high']:.2f})" for v in volumes]
        assert f"| {label} | {' | '.join(shown)} |" in DOCS.replace("**", "")
    above = [point for summary in summaries for point in summary["above modpo"]["dpo_lw"]]
    largest = max(above, key=lambda point: point["mean"])
    assert all(point["low"] <= 1e-9 for point in above)
    assert " is {mean:.3f}, with an interval from {low:.3f} to {high:.3f}.".format(**largest) in DOCS
    costs = list(result["costs"].values())
    rl = [cost["rl"]["classifiers"] for cost in costs]
    until = [f"{c['until_it_has_what_modpo_has']['seconds']['cpu']:.1f}" for c in rl]
    until = [("at least " if None in c["steps_until"] else "") + seconds for c, seconds in zip(rl, until, strict=True)]
    rows = {
        "MODPO, margin policy and soups included": [f"{cost['modpo']['cpu']:.1f}" for cost in costs],
        "RL with as many prompts as there are pairs": [
            f"{c['as_many_prompts_as_pairs']['seconds']['cpu']:.1f}" for c in rl
        ],
        "RL until it has MODPO's `w . r - beta KL` at every weight": until,
        "of that, the two reward models": [f"{c['reward models']['cpu']:.1f}" for c in rl],
    }
    for label, values in rows.items():
        assert f"| {label} | {' | '.join(values)} |" in DOCS
    ratios = [c["until_it_has_what_modpo_has"]["modpo_over_rl"]["cpu"] for c in rl]
    assert "it costs {:.1f} and {:.1f} times RL".format(*ratios) in DOCS and f"at most {ratios[2]:.1f} on" in DOCS


def test_options_and_keys_that_the_page_names_exist():
    from align.cli.front import add_arguments
    from align.trainers.modpo import MODPOConfig

    fields = MODPOConfig.__dataclass_fields__
    for name in ("sweep_points", "sweep_min_weight", "interpolate", "margin_cache_dir", "objective", "weights"):
        assert name in fields and f"`{name}`" in DOCS or f"--{name}" in DOCS
    import argparse

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    options = {option for action in parser._actions for option in action.option_strings}
    assert {"--n", "--reference_point", "--prompts", "--rewards", "--names", "--max_completion_length"} <= options
