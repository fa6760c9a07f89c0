"""The examples of docs/training.md are one program that runs, and its table names the metrics that there are."""

import re
from pathlib import Path

import pytest
import torch

DOCS = (Path(__file__).parents[3] / "docs" / "training.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The variables of the program after its end."""
    code, variables = "\n".join(re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("docs"))
        torch.manual_seed(0)  # of the model, which the page draws without one
        exec(compile(code, "docs/training.md", "exec"), variables)
    return variables


def test_the_examples_run(program):
    run = program["run"]
    assert run.step.tolist() == [0, 5, 10] and run.kl[0] == 0
    assert run.proxy[-1] > run.proxy[0] and run.kl[-1] > 0.1


def test_the_table_has_every_metric(program):
    described = set(re.findall(r"`([\w/<>]+)`", " ".join(re.findall(r"^\| (.*?) \|", DOCS, re.MULTILINE))))
    logged = {key for entry in program["trainer"].state.log_history for key in entry}
    ours = {key for key in logged if not key.startswith(("eval_", "train_"))}
    ours -= {"epoch", "step", "learning_rate", "total_flos"}
    named = {re.sub("^time/.*", "time/<phase>", re.sub("^rewards/.*", "rewards/<name>", key)) for key in ours}
    # test_on_policy.py reads the first of an adapter, test_on_policy_methods.py the others with rollout_correction
    elsewhere = {"rollout/arrived_share", "rollout/correction_weight", "rollout/correction_dropped"}
    assert named == described - elsewhere and elsewhere <= described
