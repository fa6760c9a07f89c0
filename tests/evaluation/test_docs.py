"""docs/overoptimization.md: every command and every Python block runs, as written, from a copy of the examples."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from align.cli.main import main
from align.evaluation.summary import read_summary

ROOT = Path(__file__).parents[2]


def blocks(language):
    text = (ROOT / "docs" / "overoptimization.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.S | re.M)


def test_commands_run_as_written(tmp_path, monkeypatch, capsys):
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    commands = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]
    assert len(commands) == 3
    for command in commands:
        program, *argv = shlex.split(command)
        assert program == "align" and main(argv) == 0
        assert (tmp_path / argv[argv.index("--output_dir") + 1] / "report.html").exists()
    summary = read_summary(tmp_path / "outputs" / "bon")
    assert list(summary["best_of_n"]) == ["rm0", "rm1", "wco", "uwo:0.5"]
    assert summary["best_of_n"]["rm0"]["peak"]["verdict"] == "over-optimised"
    runs = read_summary(tmp_path / "outputs" / "overoptimization")["runs"]
    assert [run["peak"]["verdict"] for run in runs.values()] == ["over-optimised", "not over-optimised"]
    assert "over-optimised" in capsys.readouterr().out


def test_python_blocks_run_as_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert len(blocks("python")) == 1
    for block in blocks("python"):
        exec(compile(block, "docs/overoptimization.md", "exec"), {})
    assert "(2, 2)" in capsys.readouterr().out


def test_options_of_commands_that_are_not_run_exist(capsys):
    """The commands in text blocks need a trained model: their options are checked, and tests/evaluation/test_cli
    runs them."""
    from align.cli.main import build_parser

    shown = [block.replace("\\\n", " ") for block in blocks("text") if block.startswith("align ")]
    assert len(shown) == 1
    for command in shown:
        args, extra = build_parser().parse_known_args(shlex.split(command)[1:])
        assert extra == [] and args.model == "runs/sft" and args.rewards == ["runs/rm0", "runs/rm1"]


def test_the_example_files_are_what_their_script_writes(tmp_path):
    for name in ("make_bon_examples.py", "bon_rewards.py"):
        shutil.copy(ROOT / "examples" / name, tmp_path)
    subprocess.run(
        [sys.executable, tmp_path / "make_bon_examples.py"], check=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}
    )
    assert (tmp_path / "bon_scores.csv").read_text() == (ROOT / "examples" / "bon_scores.csv").read_text()
    for name in ("single", "ensemble"):
        path = Path("evaluations") / name / "overoptimization.jsonl"
        new, old = ((folder / path).read_text().splitlines() for folder in (tmp_path, ROOT / "examples"))
        assert new[1:] == old[1:]  # the header has the date
