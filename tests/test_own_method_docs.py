"""docs/own_method.md: its blocks are one program that runs, its commands run, its table names what is there."""

import re
import shlex
from pathlib import Path

import pytest

from align.cli.main import main
from align.lazy import load
from align.methods import METHODS
from align.objectives.preference import LOSSES
from align.trainers.on_policy.estimators import ESTIMATORS
from align.trainers.weighting.sections import DYNAMIC_WEIGHTS
from tests.trainers.tiny_runs import logged

PAGE = (Path(__file__).parents[1] / "docs/own_method.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.S | re.M)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The variables of the program after its end, run in a folder of its own, where its files are."""
    for method in METHODS.values():
        load(method.trainer)  # whose estimators stay in the tables
    tables = LOSSES, ESTIMATORS, DYNAMIC_WEIGHTS.kinds
    before = [dict(table) for table in tables]
    variables: dict = {"__name__": "own_method"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder := tmp_path_factory.mktemp("own"))
        Path("sweep.yaml").write_text(blocks("yaml")[0])
        exec(compile("\n".join(blocks("python")), "docs/own_method.md", "exec"), variables)
        yield variables | {"folder": folder}
    for table, old in zip(tables, before, strict=True):
        table.clear()
        table.update(old)


def test_the_methods_did_what_they_say(program):
    assert program["trainer"].state.global_step == program["smooth"].state.global_step == 2
    start = logged(program["trainer"], "loss")[0]
    assert start == pytest.approx(program["logsigmoid"](program["torch"].tensor(-0.3)).neg().item(), abs=1e-5)
    metrics = {key for entry in program["weighted"].state.log_history for key in entry}
    assert {"gap", "eval_gap", "eval_clear_wins"} <= metrics
    assert logged(program["smooth"], "free_kl/above") and program["smooth"].estimator.num_generations == 2
    assert logged(program["level"], "level/multiplier") and logged(program["level"], "rewards/rm")
    assert program["level"].rewards.rewards[0].aggregation.__name__ == "trimmed_mean"
    weights = [entry for entry in logged(program["early"], "mask_u_mean/chosen")]
    assert weights and all(0 < weight < 1 for weight in weights)
    assert program["policy"].lm_head.weight.grad is not None and len(program["log"]) and len(program["ends"]) == 3


def lines() -> list[str]:
    """The commands, the loops of the shell written out."""
    found = []
    for line in filter(None, "\n".join(blocks("bash")).splitlines()):
        loop = re.fullmatch(r"for (\w+) in (.*?); do (.*); done", line)
        found += [loop[3].replace(f"${loop[1]}", value) for value in loop[2].split()] if loop else [line]
    return found


def test_the_commands_run(program, monkeypatch):
    monkeypatch.chdir(program["folder"])
    assert len(lines()) == 5
    for line in lines():
        align, *argv = shlex.split(line)
        assert align == "align" and main(argv) == 0, line
    assert Path("outputs/own/report.html").exists() and Path("outputs/report.html").exists()
    assert Path("runs/beta-1.0/checkpoint-2").exists() and len(list(Path("runs/ref_log_probs").glob("*.arrow"))) == 2
