"""README.md and the pages of `PAGES`: every command is run, or resolved where it needs a model from a hub."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from align.cli.main import build_parser, main
from align.config.resolve import resolve
from align.methods import METHODS

ROOT = Path(__file__).parents[1]
METHOD_PAGES = tuple(f"docs/methods/{name}.md" for name in METHODS)
PAGES = ("README.md", "docs/cli.md", "docs/launching.md", "docs/online.md", *METHOD_PAGES)
SET_UP = ("make ", "python3.11 -m venv", ".venv/bin/pip", "pip ", "sbatch ", "python -c")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), flags=re.S | re.M)


def commands(page: str) -> list[str]:
    lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    return [line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_one_that_is_tested(page):
    assert commands(page)
    for command in commands(page):
        assert command.startswith((*SET_UP, "align ")), command


def test_the_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = {shlex.split(c)[1] for c in commands("README.md") if c.startswith("make ")}
    assert targets == {"quickstart", "test"}
    for target in targets:
        assert f"\n{target}:" in makefile


def test_the_install_commands_are_those_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text().replace("$(BIN)/pip install -q", ".venv/bin/pip install")
    installs = [command for command in commands("README.md") if command.startswith(".venv/bin/pip")]
    assert len(installs) == 3
    for command in installs:
        assert command in makefile


METHOD_COMMANDS = [
    command for page in PAGES for command in commands(page) if command.split()[1:2] and command.split()[1] in METHODS
]


@pytest.mark.parametrize("command", METHOD_COMMANDS)
def test_method_commands_resolve(command, monkeypatch):
    """Their models and data are on a hub; tests/cli trains and dry-runs the same commands on local ones."""
    monkeypatch.chdir(ROOT)
    args, extra = build_parser().parse_known_args(shlex.split(command)[1:])
    run = resolve(args.command, args.config, extra)
    assert run.method.name == args.command and run.training.output_dir


@pytest.mark.parametrize("command", [c for page in PAGES for c in commands(page) if c.startswith("align launch")])
def test_launch_commands_print_what_they_would_run(command, monkeypatch, capsys, tmp_path):
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    argv = shlex.split(command)[1:]
    assert main([*argv, *([] if "--dry-run" in argv else ["--dry-run"])]) == 0
    assert "accelerate" in (out := capsys.readouterr().out) or "#SBATCH" in out


def test_curve_commands_run_as_written(monkeypatch, tmp_path):
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    shown = [c for c in commands("README.md") if c.startswith(("align bon", "align overoptimization"))]
    assert len(shown) == 2
    for command in shown:
        argv = shlex.split(command)[1:]
        assert main(argv) == 0
        assert (tmp_path / argv[argv.index("--output_dir") + 1] / "report.html").exists()


def test_the_python_block_trains(monkeypatch, tmp_path):
    """With a local policy, reward models and prompts in the place of the hub's, and fewer steps."""
    import json

    from align import build_reward
    from align.data import toy
    from align.quickstart.phases import make_policy
    from align.reward_models.ensemble import save_ensemble
    from align.reward_models.normalizer import Normalizer

    monkeypatch.chdir(tmp_path)
    tokenizer = toy.tokenizer()
    policy = make_policy(len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id, seed=0)
    policy.save_pretrained("policy")
    tokenizer.save_pretrained("policy")
    from align.modeling.load import load_sequence_classifier

    for i in range(2):
        member = Path("runs/reward") / f"member_{i}"
        load_sequence_classifier("policy", head_seed=i, pad_token_id=tokenizer.pad_token_id).save_pretrained(member)
        tokenizer.save_pretrained(member)
        Normalizer(mean=0.0, std=1.0, count=2, fitted_on="nothing: a test").save(member)
    save_ensemble("runs/reward", ["member_0", "member_1"])
    for name, rows in zip(("train", "eval"), toy.split_prompts(0, 32, 8), strict=True):
        Path(f"{name}_prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("my_rewards.py").write_text("from align.data.toy import gold\n")
    (block,) = blocks("README.md", "python")
    for old, new in (
        ("Qwen/Qwen2.5-0.5B-Instruct", "policy"),
        ("max_steps=200", "max_steps=2, max_prompt_length=16, max_completion_length=8, rollout='transformers'"),
        ("eval_steps=20", "eval_steps=1"),
    ):
        assert old in block
        block = block.replace(old, new)
    exec(compile(block, "README.md", "exec"), {})
    assert (tmp_path / "runs/remax/overoptimization.jsonl").exists()
    assert build_reward({"type": "ensemble", "path": "runs/reward", "aggregation": "mean"}).name == "reward"
