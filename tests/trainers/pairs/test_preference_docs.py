"""The examples of docs/preference.md are one program that runs, its table names the metrics, its commands resolve."""

import re
import shlex
from pathlib import Path

import pytest

from align.config.resolve import resolve

ROOT = Path(__file__).parents[3]
DOCS = (ROOT / "docs" / "preference.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The variables of the program after its end."""
    code, variables = "\n".join(re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("docs"))
        exec(compile(code, "docs/preference.md", "exec"), variables)
    return variables


def test_the_examples_run(program):
    margins = [entry["rewards/margins"] for entry in program["trainer"].state.log_history if "rewards/margins" in entry]
    assert margins[-1] > margins[0] + 0.05
    assert len([entry for entry in program["weighted"].state.log_history if "loss" in entry]) == 2


def test_the_table_has_every_metric(program):
    described = set(re.findall(r"`([\w/<>]+)`", " ".join(re.findall(r"^\| (.*?) \|", DOCS, re.MULTILINE))))
    logged = {key for name in ("trainer", "lora") for entry in program[name].state.log_history for key in entry}
    ours = {key for key in logged if not key.startswith(("eval_", "train_"))}
    ours -= {"epoch", "step", "learning_rate", "total_flos"}
    assert {
        re.sub("^(time|loss)/.*", lambda m: f"{m[1]}/" + {"time": "<phase>", "loss": "<name>"}[m[1]], key)
        for key in ours
    } <= described


@pytest.mark.parametrize("line", re.findall(r"^align dpo .*$", DOCS, re.MULTILINE))
def test_the_commands_resolve(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = [word for word in shlex.split(line)[2:] if word != "--dry-run"]
    assert resolve("dpo", words[1], words[2:]).training.beta is not None


def test_the_error_is_the_one_shown(tmp_path):
    from align.trainers.dpo import DPOConfig

    with pytest.raises(Exception, match="label_smoothing would be ignored") as caught:
        DPOConfig(output_dir=str(tmp_path), label_smoothing=0.1)
    assert f"align: error: {caught.value}" in DOCS
