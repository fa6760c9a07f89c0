"""docs/losses.md: its table is the table of the code, and its example runs."""

import re
from pathlib import Path

import pytest
import torch
from torch.nn.functional import logsigmoid

from align.objectives.preference import LOSSES
from align.objectives.preference_objective import preference_objective

DOCS = (Path(__file__).parents[2] / "docs" / "losses.md").read_text(encoding="utf-8")


def rows(header: str) -> list[list[str]]:
    """The cells of the table whose first column has this header."""
    lines = DOCS[DOCS.index(f"| {header} |") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in re.split(r" \|(?= |$)", line.removeprefix("|"))[:-1]] for line in lines]


def test_the_table_is_that_of_the_code():
    described = {
        name.strip("`"): (dict(re.findall(r"`(\w+)` ([\w.]+)", options)), reference)
        for name, _, options, reference, _ in rows("loss_type")
    }
    in_code = {
        name: (
            {option: str(default) for option, default in loss.defaults.items()},
            ("yes" if loss.needs_reference else "no") + (", and KL" if loss.needs_kl else ""),
        )
        for name, loss in LOSSES.items()
    }
    assert described == in_code


def test_the_modifiers_are_those_of_the_code():
    named = {option.strip("`"): re.findall(r"`(\w+)`", losses) for option, _, losses in rows("option")}
    having = {m: [name for name, loss in LOSSES.items() if m in loss.modifiers] for m in named}
    assert named["f_divergence_type"] == having["f_divergence_type"]
    assert sorted(named["f_divergence_type"] + named["ld_alpha"]) == sorted(having["ld_alpha"])
    assert set(named["use_weighting"]) == set(LOSSES) - set(having["use_weighting"])


@pytest.fixture
def program():
    """The variables of the examples after their end; the table of losses is put back."""
    before, variables = dict(LOSSES), {}
    exec(compile("\n".join(re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)), "docs/losses.md", "exec"), variables)
    yield variables
    LOSSES.clear()
    LOSSES.update(before)


def test_the_example_is_what_it_says(program):
    z = 0.1 * torch.tensor(0.5 + 0.7)
    expected = -torch.sigmoid(-z) * logsigmoid(z) + 0.1 * 1.7 / 3
    torch.testing.assert_close(program["losses"], expected.reshape(1))
    assert (program["logps"].grad[0] < 0).all() and program["logps"].grad[1].tolist()[2] == 0
    ten_lines = re.search(r"@register_loss.*?```", DOCS, re.DOTALL)[0].splitlines()
    assert len(ten_lines) <= 10


def test_rewards_are_of_the_log_ratio_whatever_the_divergence():
    objective = preference_objective("sigmoid", given={"f_divergence_type": "forward_kl"})
    logps = torch.tensor([[-1.0], [-2.0]], requires_grad=True)
    found = objective(objective.pairs(logps, torch.ones(2, 1), torch.tensor([[-1.5], [-1.0]])))
    assert [found.chosen_rewards.item(), found.rejected_rewards.item()] == pytest.approx([0.05, -0.1])
