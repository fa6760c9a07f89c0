"""The commands of docs/ensembles.md resolve, and its specs and its Python run on small stand-ins."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig

from align.cli.main import build_parser
from align.config.resolve import resolve
from align.objectives.ensemble import RULES
from align.reward_models.base import RewardBatch
from align.reward_models.build import build_reward
from align.reward_models.ensemble import KINDS
from align.trainers.sweeps.ensemble import train_reward_ensemble
from tests.modeling import tiny
from tests.reward_models import worlds
from tests.trainers.reward_runs import config, pairs

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "ensembles.md").read_text(encoding="utf-8")
OPTIONS = {"separate": {}, "lora": {"peft_config": LoraConfig(r=2)}, "trunk": {"upper_layers": 1}}


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", DOCS, re.DOTALL)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm")
    tiny.causal(dtype=torch.float32, num_hidden_layers=3).save_pretrained(folder)
    worlds.tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("command", [line for block in blocks("bash") for line in block.splitlines()])
def test_commands_resolve(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    args, extra = build_parser().parse_known_args(shlex.split(command)[1:])
    run = resolve(args.command, args.config, extra)
    assert run.ensemble.ensemble == 5 and run.training.output_dir.startswith("runs/")


def test_specs_are_built(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, options in OPTIONS.items():
        kind = {"trunk": "shared_trunk"}.get(name, name)
        args = config(f"runs/{name}", max_steps=1)
        train_reward_ensemble(model, args, pairs(16), pairs(8, seed=1), members=2, kind=kind, **options)
    (block,) = blocks("yaml")
    for spec in yaml.safe_load(block)["rewards"]:
        output = build_reward(spec, device="cpu").score(RewardBatch(["w1 ", "w2 "], ["w3", "w4"]))
        assert output.scores.isfinite().all() and len(output.extras) == 4


def test_the_python_block_runs(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = blocks("python")
    for old, new in (
        ("Qwen/Qwen2.5-0.5B-Instruct", model),
        ('output_dir="runs/trunk"', 'output_dir="runs/trunk", max_steps=1, use_cpu=True, report_to="none"'),
    ):
        assert old in block
        block = block.replace(old, new)
    variables = {"train_pairs": pairs(16), "eval_pairs": pairs(8, seed=1), "prompts": ["w1 "], "completions": ["w3"]}
    exec(compile(block, "docs/ensembles.md", "exec"), variables)
    assert variables["output"].scores.shape == (1,)


def test_what_there_is_is_named():
    for name in (*RULES, *KINDS):
        assert f"`{name}`" in DOCS
