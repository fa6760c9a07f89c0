"""docs/reward_evaluation.md: every command and Python block runs as written, and its tables say what the code does."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from align.cli.main import build_parser, main
from align.evaluation.rewardbench import WEIGHTS
from align.evaluation.rewrites import REWRITES

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "reward_evaluation.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, flags=re.S | re.M)


def test_commands_run_as_written_and_print_what_is_shown(tmp_path, monkeypatch, capsys):
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    commands = [line for block in blocks("bash") for line in block.splitlines()]
    assert len(commands) == 2
    printed = []
    for command in commands:
        program, *argv = shlex.split(command)
        assert program == "align" and main(argv) == 0
        assert (tmp_path / argv[argv.index("--output_dir") + 1] / "reward_eval.html").exists()
        printed.append(capsys.readouterr().out)
    shown = re.search(r"^ reward  .*?(?=^```)", TEXT, flags=re.S | re.M)[0]
    for line in shown.splitlines()[:3]:
        assert line.split() in [found.split() for found in printed[0].splitlines()]
    result = json.loads((tmp_path / "outputs" / "reward_eval" / "reward_eval.json").read_text())
    assert result["rewards"]["right_sum"]["rewrites"]["double_spaces"]["accuracy_after"]["value"] == 0.5
    assert result["rewards"]["length"]["accuracy"] == result["baselines"]["the longer answer"]["accuracy"]


def test_python_blocks_run_as_written(tmp_path, monkeypatch, capsys):
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    assert len(blocks("python")) == 1
    for block in blocks("python"):
        exec(compile(block, "docs/reward_evaluation.md", "exec"), {})
    assert "right_sum 1.0 1.0" in capsys.readouterr().out
    result = json.loads((tmp_path / "outputs" / "reward_eval_python" / "reward_eval.json").read_text())
    shape = blocks("text")[2]
    of_a_reward = re.findall(r'"(\w+)"', shape.split('"baselines"')[0])
    assert set(of_a_reward) - {"rewards"} == set(result["rewards"]["length"])
    assert set(re.findall(r'"(\w+)": [{[]', shape)) | {"format", "title"} == set(result)


def test_options_of_the_command_that_needs_the_network_exist():
    for command, data in zip(blocks("text"), ("allenai/reward-bench", "allenai/reward-bench-2"), strict=False):
        args, extra = build_parser().parse_known_args(shlex.split(command)[1:])
        assert extra == [] and args.data == data and args.rewrites == ["none"]


def test_the_tables_are_those_of_the_code():
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", TEXT, flags=re.M))
    assert rows == {name: f"{rewrite.target} | {rewrite.does}" for name, rewrite in REWRITES.items()}
    for section, weights in WEIGHTS.items():
        (row,) = re.findall(rf"^\| {section} \| (.*) \|$", TEXT, flags=re.M)
        each = re.search(r"(hep-.*) (\d+) each", row)
        shown = dict(part.rsplit(" ", 1) for part in row.split(", ") if part[-1].isdigit())
        shown |= dict.fromkeys(each[1].split(", "), each[2]) if each else {}
        assert shown == {name: str(weight) for name, weight in weights.items()}


def test_the_example_pairs_are_what_their_script_writes(tmp_path):
    shutil.copy(ROOT / "examples" / "make_pairs_example.py", tmp_path)
    subprocess.run([sys.executable, tmp_path / "make_pairs_example.py"], check=True)
    assert (tmp_path / "pairs.jsonl").read_text() == (ROOT / "examples" / "pairs.jsonl").read_text()
