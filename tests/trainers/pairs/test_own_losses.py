"""Losses and metrics of users: named by their place, defined again, and refused where they are no number per pair."""

from pathlib import Path

import pytest
import torch
from torch.nn.functional import logsigmoid

from align.config.resolve import resolve
from align.errors import ConfigError, DataError, TrainingError
from align.objectives.pair_losses import PairLosses
from align.objectives.preference import LOSSES, register_loss
from align.trainers.dpo import DPOTrainer
from align.trainers.pairs.preference import PreferenceTrainer
from tests.trainers.pairs.preference_runs import dpo_config, toy_pairs
from tests.trainers.tiny_runs import logged

FILE = """
from torch.nn.functional import logsigmoid

from align import register_loss


def gap(pairs, *, beta=0.1, gap_size=1.0):
    return -logsigmoid(beta * pairs.delta - gap_size)


@register_loss("free_gap", needs_reference=False)
def free(pairs, *, beta=0.1):
    return -logsigmoid(beta * (pairs.chosen - pairs.rejected))
"""


@pytest.fixture
def table():
    before = dict(LOSSES)
    yield LOSSES
    LOSSES.clear()
    LOSSES.update(before)


def test_a_loss_is_named_by_its_place(table, policy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my_losses.py").write_text(FILE)
    words = ["--loss_type", "my_losses.py:gap", "sigmoid", "--loss_options.gap_size", "2", "--output_dir", "out"]
    args = resolve("dpo", None, ["--model_name_or_path", policy, "--dataset_name", "pairs", *words]).training
    assert args.loss_type == ["my_losses.py:gap", "sigmoid"] and args.objective().needs_reference
    trainer = DPOTrainer(
        policy, dpo_config("out", loss_type=args.loss_type, loss_options=args.loss_options), toy_pairs(16)
    )
    trainer.train()
    torch.testing.assert_close(logged(trainer, "loss/gap")[0], -logsigmoid(torch.tensor(-2.0)).item())
    registered = dpo_config("out", loss_type="my_losses.py:free")  # as its decorator says, and read more than once
    assert not registered.objective().needs_reference and registered.objective().terms[0].name == "free_gap"
    with pytest.raises(ConfigError, match=r"loss_type 'my_losses.py:gapp': no function 'gapp' there; it has free, gap"):
        dpo_config("out", loss_type="my_losses.py:gapp")


def test_a_cell_that_is_run_again_replaces_its_loss(table):
    cell = "@register_loss('mine')\ndef mine(pairs, *, beta=0.1):\n    return {} * pairs.delta"
    for factor in (1, 2):
        exec(cell.format(factor), {"__name__": "__main__", "register_loss": register_loss})
    pairs = type("Pairs", (), {"delta": 3.0})
    assert table["mine"].function(pairs) == 6.0
    with pytest.raises(ConfigError, match="there is a loss 'mine' already"):
        exec(
            "@register_loss('mine')\ndef other(pairs): return pairs.delta",
            {"__name__": "m", "register_loss": register_loss},
        )


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda z: z.mean(), r"a tensor of shape \[8\] \(not a mean.*, got \[\]"),
        (lambda z: z[:, None], r"a tensor of shape \[8\], got \[8, 1\]"),
        (lambda z: z[:, None] - z, r"a tensor of shape \[8\], got \[8, 8\]"),
        (lambda z: z.detach(), "has no gradient"),
        (lambda z: z.tolist(), "expected a tensor with one number per pair, got list"),
    ],
)
def test_what_is_no_loss_per_pair_is_refused(returned, message, table, policy, tmp_path):
    register_loss("wrong", lambda pairs, *, beta=0.1: returned(-logsigmoid(beta * pairs.delta)))
    trainer = DPOTrainer(policy, dpo_config(tmp_path, loss_type="wrong"), toy_pairs(8))
    with pytest.raises(TrainingError, match=f"loss 'wrong'.*{message}"):
        trainer.train()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (None, "train: the method's `columns` name gap, which the data set does not have"),
        (["a"] * 8, "train: the column gap must hold numbers, and holds Value.'string'"),
        ([1.0, None] * 4, r"train: the column gap has no number in 4 pairs: rows \[1, 3, 5, 7\]"),
    ],
)
def test_columns_that_a_method_names_hold_numbers(values, message, policy, tmp_path):
    """Else there was an error of datasets, or of torch at the first step."""
    rows = toy_pairs(8) if values is None else toy_pairs(8).add_column("gap", values)
    with pytest.raises(DataError, match=message):
        type("Own", (DPOTrainer,), {"columns": ("gap",)})(policy, dpo_config(tmp_path), rows)


def test_metrics_of_an_evaluation_have_names(policy, tmp_path):
    args = dpo_config(tmp_path)
    trainer = DPOTrainer(policy, args, toy_pairs(8), toy_pairs(8), compute_metrics=lambda prediction: 1.0)
    with pytest.raises(TrainingError, match="compute_metrics must return numbers by name .a dict., got float"):
        trainer.evaluate()


class Own(PreferenceTrainer):
    wrong = "metric"

    def losses(self, policy, reference, batch):
        chosen, rejected = (policy.logps - reference.logps).sum(-1).chunk(2)
        losses = -logsigmoid(chosen - rejected)
        if self.wrong == "bare":
            return losses
        metrics = {"mine": losses.mean().item() if self.wrong == "number" else losses.detach().mean()}
        return PairLosses(losses if self.wrong != "losses" else losses.mean(), chosen, rejected, metrics)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("bare", r"Own.losses must return align.objectives.pair_losses.PairLosses.*, got Tensor"),
        ("losses", r"Own.losses, the losses: .*shape \[8\] \(not a mean"),
        ("metric", r"Own.losses, mine: .*shape \[8\] \(not a mean"),
        ("number", "Own.losses, mine: expected a tensor with one number per pair, got float"),
    ],
)
def test_a_method_that_returns_something_else_is_refused_at_its_first_step(wrong, message, policy, tmp_path):
    """A metric that is a mean already was an error of the first evaluation, and a mean loss one of torch's."""
    trainer = type("Own", (Own,), {"wrong": wrong})(policy, dpo_config(tmp_path), toy_pairs(8))
    with pytest.raises(TrainingError, match=message):
        trainer.train()
