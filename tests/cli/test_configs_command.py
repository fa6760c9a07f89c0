"""`align configs`: ready configs by name, shown with what they extend, and copied."""

import pytest

from align.cli.main import main
from align.config import configs_dir
from align.config.resolve import resolve
from align.config.source import read_file


def test_every_ready_config_is_listed_in_a_line(capsys):
    assert main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(path.stem for path in configs_dir().glob("*.yaml"))
    assert all(len(line.split()) > 4 and not line.endswith(("al", ".")) for line in lines)
    assert not any("align " in line for line in lines)  # the commands of the comment


def test_show_prints_what_is_extended_with_its_place(capsys):
    assert main(["configs", "show", "dpo"]) == 0
    shown = capsys.readouterr().out
    assert f"output_dir: runs/dpo{' ' * 37}# {configs_dir() / 'dpo.yaml'}, line" in shown
    assert f"# {configs_dir() / 'base/pairs.yaml'}, line" in shown


def test_a_copy_resolves_as_the_original(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["configs", "copy", "dpo", "my.yaml"]) == 0
    values = {key: entry.value for key, entry in read_file("my.yaml").items()}
    assert values == {key: entry.value for key, entry in read_file("dpo").items()}
    assert resolve("dpo", "my.yaml", []).training.output_dir == resolve("dpo", "dpo", []).training.output_dir
    assert main(["configs", "copy", "dpo", "my.yaml"]) == 2
    assert "cannot write my.yaml: File exists" in capsys.readouterr().err


@pytest.mark.parametrize("action", ["show", "copy"])
def test_what_is_not_there_is_named(action, capsys):
    assert main(["configs", action]) == 2
    assert f"align configs {action} needs the name of a config" in capsys.readouterr().err
    assert main(["configs", action, "dpoo"]) == 2
    assert "nearest ready config: dpo" in capsys.readouterr().err


def test_launch_takes_a_ready_name(capsys):
    assert main(["launch", "dpo", "--num-processes", "2", "--dry-run"]) == 0
    assert "align dpo --config dpo" in capsys.readouterr().out
