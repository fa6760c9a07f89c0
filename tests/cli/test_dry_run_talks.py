"""`--dry-run` of conversations with an environment and tools: what the run would refuse is refused."""

import re
from pathlib import Path

import pytest

from align.cli.main import main
from tests.cli.test_dry_run import run
from tests.trainers.on_policy.talks import talking_tokenizer
from tests.trainers.tiny_runs import tiny_model

WORLD = """
class Game:
    def reset(self, row): return "five"
    def step(self, answer): return None, 1.0, True

class Sized(Game):
    def __init__(self, size): ...

class NoReset:
    def step(self, answer): return None, 1.0, True

def double(number: str) -> str:
    \"\"\"Twice a number.

    Args:
        number: its name.
    \"\"\"
    return number
"""


@pytest.fixture
def talks(tmp_path, monkeypatch):
    """The words of a run on prompts that the environment makes up."""
    monkeypatch.chdir(tmp_path)
    tokenizer = talking_tokenizer()
    for part in (tokenizer, tiny_model(tokenizer)):
        part.save_pretrained("model")
    Path("world.py").write_text(WORLD)
    Path("rows.jsonl").write_text('{"environment": "a"}\n{"environment": "c"}\n')
    sizes = ["--max_prompt_length", "30", "--max_completion_length", "20", "--num_generations", "2", "--max_steps", "1"]
    sizes += ["--per_device_train_batch_size", "1"]
    return ["grpo", "--model_name_or_path", "model", "--dataset_name", "rows.jsonl", *sizes, "--output_dir", "run"]


def test_an_environment_makes_up_the_prompts_and_tools_are_in_them(talks, capsys):
    """As in the run: rows without prompts were refused, and the first example had no tools."""
    shown = run(capsys, *talks, "--environment", "world.py:Game", "--tools", "world.py:double")
    assert "2 of 2 rows can be used" in shown["data"] and "double" in shown["first example"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--environment", "world.py:Sized"], "environment Sized cannot be made, .* without arguments: TypeError: "),
        (["--environment", "world.py:NoReset"], "command line: environment NoReset has no method reset"),
        (["--environment", "{a: 'world.py:Game', b: 'world.py:Game'}"], "row 1 has environment='c', which is not amo"),
        (
            ["--environment", "world.py:Game", "--partial_rollouts=2", "--rollout_correction=token_truncate"],
            "partial_rollouts draws them in parts",
        ),
    ],
)
def test_an_environment_that_the_run_would_refuse_is_refused(given, message, talks, capsys):
    assert main([*talks, *given, "--dry-run"]) == 2
    assert re.search(message, capsys.readouterr().err)
