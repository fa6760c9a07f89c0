"""Two processes (gloo) train what one trains: same losses, gradient norms, rollouts, evaluations and weights."""

import pytest
import torch

from tests.trainers.on_policy.on_ranks import KEYS, makers, train
from tests.trainers.tiny_runs import assert_same
from tests.trainers.two_processes import run_on_two


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def runs(policy, folder):
    one = train(policy, folder / "one", 1)
    return one, *run_on_two("tests.trainers.on_policy.on_ranks", folder / "two", policy, "transformers")


@pytest.mark.parametrize(("method", "steps"), [("sft", 4), ("remax", 4), ("ppo", 8)])
def test_two_processes_are_one(runs, method, steps):
    one, first, second = (run[method] for run in runs)
    assert len(one["logs"]["loss"]) == len(one["logs"]["grad_norm"]) == steps
    for key in KEYS:
        torch.testing.assert_close(
            torch.tensor(first["logs"][key]), torch.tensor(one["logs"][key]), rtol=1e-4, atol=1e-5, msg=key
        )
    assert_same(first["weights"], second["weights"])
    for name, weight in one["weights"].items():
        # Adam turns a gradient that is nothing but rounding into a whole step, so a few single weights may differ
        gap = (first["weights"][name] - weight).abs()
        assert gap.mean() < 1e-6 and (gap > 1e-5).float().mean() < 1e-3, f"{name}: mean {gap.mean()}, {gap.max()}"


def test_they_write_one_evaluation_file(runs):
    one, first, second = (run["remax"]["evaluations"] for run in runs)
    assert [record["step"] for record in one] == [0, 2, 4] and first == second
    for ours, record in zip(one, first, strict=True):
        assert [s["completion"] for s in ours["samples"]] == [s["completion"] for s in record["samples"]]
        for name in ("kl", "kl_k3", "proxy", "gold", "length", "entropy"):
            assert len(record["per_prompt"][name]) == 5
            assert record["per_prompt"][name] == pytest.approx(ours["per_prompt"][name], rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("method", ["remax", "ppo"])
def test_they_resume_exactly(runs, method):
    for run in runs:
        whole, resumed = run[method], run[f"{method} resumed"]
        assert_same(resumed["weights"], whole["weights"])
        assert resumed["logs"] == whole["logs"]
        assert resumed["evaluations"] == whole["evaluations"]


def test_one_process_goes_on_where_two_stopped(runs, policy, folder, caplog):
    trainer = makers(policy, folder / "other", 1)["sft"]()
    trainer.train(resume_from_checkpoint=folder / "two" / "sft" / "checkpoint-2")
    assert "was written by 2 processes, and 1 go on from it" in caplog.text
    for name, weight in runs[0]["sft"]["weights"].items():
        torch.testing.assert_close(trainer.model.get_parameter(name), weight, rtol=0, atol=2e-4, msg=name)
