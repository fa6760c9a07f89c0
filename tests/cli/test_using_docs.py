"""docs/using.md: its commands run as they are written, one after the other, on a tiny policy."""

import io
import re
import shlex
from pathlib import Path

from align.cli.chat import COMMANDS
from align.cli.main import main
from tests.cli.test_generate_chat import REWARD
from tests.modeling.test_export import adapter, base

PAGE = (Path(__file__).parents[2] / "docs/using.md").read_text()


def test_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    adapter(base(tmp_path / "my_policy"), "runs/dpo", target_modules=["q_proj"])
    Path("my_rewards.py").write_text(REWARD)
    Path("prompts.txt").write_text("w1 w2\nw3\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("/tokens 4\nw1 w2\n"))
    commands = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S) for line in block.splitlines()]
    assert commands
    monkeypatch.setattr("align.rollout.make.choose_backend", lambda backend: "transformers")  # vLLM takes a minute
    for command in commands:
        assert main(shlex.split(command)[1:]) == 0
    assert "(short: -" in capsys.readouterr().out
    assert len(Path("answers.jsonl").read_text().splitlines()) == 4


def test_the_table_has_every_command_of_a_chat():
    shown = set(re.findall(r"`(/\w+)", PAGE))
    assert shown == {line.split()[0] for line in COMMANDS.splitlines()}
