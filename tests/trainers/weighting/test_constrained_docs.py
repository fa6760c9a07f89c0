"""docs/constrained.md: its commands run or resolve, its programs run, its tables name what there is."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from align.cli.main import build_parser
from align.config import configs_dir
from align.config.resolve import resolve
from align.data import toy
from align.evaluation.records import EvalWriter
from align.trainers.weighting.base import make_weighting
from align.trainers.weighting.sections import LagrangianSection
from tests.trainers.tiny_runs import on_policy, prompts, tiny_model, wanted_words

ROOT = Path(__file__).parents[3]
DOCS = (ROOT / "docs" / "constrained.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", DOCS, re.DOTALL) for line in block.strip().splitlines()]
TRAINING = [command for command in COMMANDS if "--dry-run" in command]


@pytest.mark.parametrize("command", TRAINING)
def test_training_commands_resolve(command):
    _, method, *tokens = shlex.split(command)
    tokens.remove("--dry-run")
    file = tokens[tokens.index("--config") + 1]
    run = resolve(method, str(configs_dir() / Path(file).name), [t for t in tokens if t not in ("--config", file)])
    assert run.training.constraints


def test_every_preset_is_named():
    presets = {path.name for path in configs_dir().glob("*_ppo*.yaml")} | {"ppo_sat.yaml", "ppo_sat_released.yaml"}
    assert presets == {Path(shlex.split(c)[3]).name for c in TRAINING if c.startswith("align ppo")}


def test_ppo_lag_is_that_of_safe_rlhf(tmp_path):
    """Start, mixture, price of the KL and the first step of lambda, by the formulas of its trainer."""
    options = yaml.safe_load(DOCS.split("## Coming from Safe-RLHF")[1].split("```yaml\n")[1].split("```")[0])
    names = [reward["name"] for reward in options.pop("rewards")]
    args = on_policy("ppo", tmp_path, **options)[1]
    weighting = make_weighting(dict.fromkeys(names, 1.0), args)
    assert weighting.weights() == pytest.approx([1 / 2, 1 / 2], rel=1e-3)  # lambda is 1
    assert weighting.kl_weight == pytest.approx(1.0) and weighting.update_per == "mini_batch" and not args.whitens
    cost, rate = 0.4, 0.1
    columns = {"helpful": torch.zeros(2), "safe": torch.full((2,), -cost)}
    weighting.update(columns, torch.ones(2))
    multiplier = np.exp(rate * cost)
    expected = [1 / (1 + multiplier), multiplier / (1 + multiplier)]
    assert weighting.weights() == pytest.approx(expected, rel=1e-3)
    assert abs(expected[0] - 1 / 2) > 0.009 and weighting.kl_weight == pytest.approx(1.0)


def single_reward_run(folder, which):
    rng = np.random.default_rng(which)
    writer = EvalWriter(folder, name=folder.name, method="rloo", proxy="x", gold="gold", seed=0, config={})
    for step in range(12):
        point = [0.1, 0.1]
        point[which] += 0.1 * step
        point[1 - which] += 0.03 * step
        columns = {n: x + 0.1 * rng.normal(size=16) for n, x in zip(("helpful", "polite"), point, strict=True)}
        gold = 1 - (point[0] - 0.6) ** 2 - (point[1] - 0.5) ** 2 + 0.1 * rng.normal(size=16)
        names = {f"rewards/{name}": column for name, column in columns.items()}
        writer.write(step, kl=gold * 0 + step, kl_k3=gold * 0, proxy=gold, gold=gold, length=5, **names)


def test_proxy_points_and_programs_run(tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    single_reward_run(Path("runs/only_helpful"), 0)
    single_reward_run(Path("runs/only_polite"), 1)
    (command,) = set(COMMANDS) - set(TRAINING)
    args = build_parser().parse_args(shlex.split(command)[1:])
    assert args.run(args, []) == 0
    printed = capsys.readouterr().out
    section = yaml.safe_load(printed[printed.index("constraints:") : printed.index("wrote")])
    assert {entry["reward"] for entry in section["constraints"]} == {"helpful", "polite"}
    tiny_model(tokenizer, max_position_embeddings=1024).save_pretrained("my_policy")
    tokenizer.save_pretrained("my_policy")
    Path("train_prompts.jsonl").write_text("\n".join(f'{{"prompt": "{r["prompt"]}"}}' for r in toy.prompts()[:40]))
    Path("my_rewards.py").write_text(
        "def short_answers(completions, **columns):\n    return [-float(len(text)) for text in completions]\n\n\n"
        "def polite_words(completions, **columns):\n    return [float('thanks' in text) for text in completions]\n"
    )
    first, second = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
    first = first.replace(
        "max_steps=3",
        "max_steps=3, report_to='none', max_completion_length=8, use_cpu=True, rollout='transformers'",
    )
    variables = {}
    exec(compile(first, "docs/constrained.md", "exec"), variables)
    assert variables["trainer"].state.global_step == 3
    exec(compile(second, "docs/constrained.md", "exec"), variables)
    assert variables["found"].point.shape == (2,)


def test_yaml_of_the_page_is_taken(tmp_path):
    blocks = re.findall(r"```yaml\n(.*?)```", DOCS, re.DOTALL)
    base = "model_name_or_path: some/model\ndataset_name: rows.jsonl\n"
    (tmp_path / "a.yaml").write_text(base + blocks[0])
    assert len(resolve("rloo", str(tmp_path / "a.yaml"), []).training.constraints) == 2
    (tmp_path / "b.yaml").write_text(base + blocks[1])
    assert resolve("ppo", str(tmp_path / "b.yaml"), []).training.constraints
    rewards = "rewards: [{type: rule, function: 'x.py:a'}, {type: rule, function: 'x.py:b'}]\neval_strategy: steps\n"
    for i, line in enumerate(blocks[2].strip().splitlines()):
        (tmp_path / f"{i}.yaml").write_text(base + rewards + line)
        assert resolve("rloo", str(tmp_path / f"{i}.yaml"), []).training.dynamic_weights["type"]


def test_the_results_are_those_of_the_study():
    found = json.loads((ROOT / "benchmarks" / "results" / "constrained_toy.json").read_text())["seeds"]
    table = re.findall(r"^\| (?:before|fixed|at ).*", DOCS, re.MULTILINE)
    shown = [[float(cell) for cell in line.split("|")[2:5]] for line in table]
    runs = [entry["runs"] for entry in found.values()]
    expected = [[r["fixed"]["gold"]["start"] for r in runs]]
    expected += [[r[name]["gold"]["last_quarter"] for r in runs] for name in ("fixed", "fixed_kl", "mu", "xi")]
    assert shown == [pytest.approx(line, abs=0.006) for line in expected]
    above = {
        name: [
            [reward["percent_above_threshold"][where] for r in runs for reward in r[name]["rewards"].values()]
            for where in ("rollouts", "evaluations")
        ]
        for name in ("mu", "xi")
    }
    assert 2.5 < min(above["mu"][0]) < max(above["mu"][0]) < 70.5 and max(map(abs, above["xi"][0])) < 4
    assert sum(x > 0 for x in above["mu"][1]) == 5 and round(min(above["mu"][1])) == -11
    assert sum(abs(x) <= 5 for x in above["xi"][1]) == 3 and round(max(map(abs, above["xi"][1]))) == 22
    command = re.search(r"`python (benchmarks/.*?) all`", DOCS).group(1)
    help_text = subprocess.run(
        [sys.executable, ROOT / command, "--help"], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""}
    )
    assert help_text.returncode == 0 and "all" in help_text.stdout


def rows(section: str) -> set[str]:
    """What is in backticks in the first column of the section's tables."""
    return set(re.findall(r"`([^`]+)`", " ".join(re.findall(r"^\| (`.*?) \|", section, re.MULTILINE))))


def test_the_tables_name_what_there_is(policy, tmp_path):
    sections = {part.split("\n")[0]: part for part in DOCS.split("\n## ")}
    assert rows(sections["Multipliers"]) == {*LagrangianSection.model_fields, "coefficients"}
    held = [{"reward": "wanted_words", "direction": "at_least", "threshold": 0.5}]
    two = [wanted_words, toy_polite]
    for options, section in (
        ({"constraints": held}, "Reading the metrics"),
        ({"dynamic_weights": {"type": "gradient"}}, "Dynamic weights"),
        ({"dynamic_weights": {"type": "hypervolume"}, "eval_strategy": "steps"}, "Dynamic weights"),
    ):
        kind, args = on_policy("rloo", tmp_path, max_steps=1, **options)
        trainer = kind(policy, two, args, prompts(8), prompts(8, seed=1))
        trainer.train()
        logs = {key for entry in trainer.state.log_history for key in entry}
        found = {key for key in logs if key.startswith(("constraints/", "dynamic_weights/"))}
        assert found
        found = {k.replace("wanted_words_at_least", "<c>") for k in found}
        found = {re.sub("(wanted_words|toy_polite)$", "<name>", k) for k in found}
        assert found <= rows(sections[section]), found - rows(sections[section])


def toy_polite(completions, **columns) -> list[float]:
    return [float(any(word in toy.POLITE for word in text.split())) for text in completions]
