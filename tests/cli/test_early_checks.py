"""Values that only the run itself would find wrong are refused when a configuration is read, with their place."""

import re

import pytest

from align.cli.main import main
from align.config.early_checks import check_environment, check_tools
from align.config.resolve import read_entries
from align.errors import ConfigError
from align.lazy import check_place
from align.methods import get_method
from align.trainers.grpo import GRPOConfig
from align.trainers.sft import SFTConfig

CODE = "from math import floor as lower\n\n\nclass Game: ...\n\n\nif True:\n    Other = Game\n\n\ndef _own(): ...\n"


@pytest.fixture
def read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(CODE)
    (tmp_path / "broken.py").write_text("class Game:\n")

    def read_text(text: str, *tokens: str):
        (tmp_path / "run.yaml").write_text(text)
        return read_entries(get_method("grpo"), "run.yaml", list(tokens))

    return read_text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("environment: mine", "run.yaml, line 2: environment 'mine': expected package.module:name or file.py:name"),
        ("environment: my.py:Game", "line 2: environment 'my.py:Game': no file .*/my.py"),
        ("environment: mine.py:Gane", "line 2: environment 'mine.py:Gane': no function 'Gane' there; it has Game"),
        ("environment: broken.py:Game", "line 2: environment 'broken.py:Game': .*broken.py cannot be read as Python: "),
        ("environment: no_such_package.games:Game", "no module 'no_such_package' in .* or on the path"),
        ("environment: {}", "line 2: environment names no environment: NAME: path/file.py:Class"),
        (
            "environment:\n  game: mine.py:Game\n  other: mine.py:Gane",
            "line 4: environment 'mine.py:Gane': no function",
        ),
        (
            "environment:\n  game: [mine.py:Game]",
            r"environment.game must be path/file.py:name .*, not \['mine.py:Game'\]",
        ),
        ("tools: [mine.py:lower, mine.py:lowr]", "line 2: tools: tool 'mine.py:lowr': no function 'lowr' there"),
        ("resume_changes: [learnig_rate]", "'learnig_rate' is no option of this run; nearest valid: learning_rate"),
        ("output_dir: ''", "line 2: output_dir is empty: name the folder of the run, or leave it out for 'trainer_out"),
        ("output_dir:", "line 2: output_dir is empty"),
    ],
)
def test_a_mistake_is_told_when_the_configuration_is_read(line, message, read):
    with pytest.raises(ConfigError, match=message):
        read(f"seed: 1\n{line}\n")


def test_what_may_be_right_is_taken(read):
    """`import *` and names that a file makes as it runs cannot be known without running it."""
    read("environment: {game: mine.py:Game, other: mine.py:Other, math: 'math:floor'}\ntools: [mine.py:lower]\n")
    read("environment: null\ntools: null\nresume_changes: [rewards.mine, data, learning_rate, rows_per_step]\n")
    read("resume_from_checkpoint: auto\nresume_changes: [option_of_an_older_version]\n")  # the checkpoint's, perhaps
    with open("mine.py", "a") as file:
        file.write("globals().update(made=print)\n")
    read("environment: mine.py:made\n")


def test_an_empty_variable_of_the_shell_is_no_folder(read, capsys):
    read("dataset_name: rows.jsonl\nmodel_name_or_path: m\n")
    assert main(["grpo", "--config", "run.yaml", "--output_dir", "", "--dry-run"]) == 2
    assert "command line: output_dir is empty" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="output_dir is empty"):
        SFTConfig(output_dir=" ", use_cpu=True)


@pytest.mark.parametrize("option", ["environment", "tools"])
def test_from_python_too(option, tmp_path):
    with pytest.raises(ConfigError, match="'mine.py:Gane': no file") as error:
        GRPOConfig(output_dir=str(tmp_path), use_cpu=True, **{option: "mine.py:Gane"})
    assert error.value.key == option


def test_the_message_is_that_of_the_run(read):
    """What is told early is what importing it would say."""
    from align.lazy import imported

    read("")
    for place in ("mine", "my.py:Game", "mine.py:Gane", "no_such_package.games:Game"):
        with pytest.raises(ConfigError) as late:
            imported(place, "tool")
        with pytest.raises(ConfigError, match=re.escape(str(late.value).partition(";")[0])):
            check_place(place, "tool")
    check_environment(None)
    check_tools(None)
