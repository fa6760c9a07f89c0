"""Two processes that shard a model make the run of one: every number of the log, weights, critic and multipliers."""

import pytest
import torch

from tests.trainers.core.further_ranks import RESUMED, train
from tests.trainers.tiny_runs import assert_same
from tests.trainers.two_processes import run_on_two


@pytest.fixture(scope="module")
def runs(policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("further")
    one = train(policy, folder / "one")
    return one, *run_on_two("tests.trainers.core.further_ranks", folder / "two", policy)


@pytest.mark.parametrize("case", ["modpo", "grpo", "rloo", "constrained ppo", "best"])
def test_two_processes_are_one(runs, case):
    one, first, second = (run[case] for run in runs)
    assert first["logs"] == second["logs"] and len(one["logs"]) == len(first["logs"])
    assert str(first["learned"]) == str(second["learned"])
    assert_same(first["weights"], second["weights"])
    for alone, together in zip(one["logs"], first["logs"], strict=True):
        assert together == pytest.approx(alone, rel=2e-4, abs=2e-6)
    torch.testing.assert_close(first["weights"], one["weights"], rtol=1e-5, atol=1e-6)


def test_what_was_to_happen_did(runs):
    """Groups were drawn again, multipliers moved, the run stopped early, and what it kept is not its last model."""
    one = runs[0]
    assert max(entry.get("dynamic_sampling/rounds", 0) for entry in one["grpo"]["logs"]) > 0
    assert one["constrained ppo"]["learned"]["multipliers"]["updates"] == 2
    last = one["best"]["logs"][-1]["step"]
    assert last < 8 and one["best"]["best"] == runs[1]["best"]["best"] == f"checkpoint-{last - 1}"


@pytest.mark.parametrize("case", RESUMED)
def test_they_resume_exactly(runs, case):
    for run in runs:
        whole, resumed = run[case], run[f"{case} resumed"]
        assert_same(resumed["weights"], whole["weights"])
        assert str(resumed["learned"]) == str(whole["learned"])
        # train_loss is of the steps since it resumed
        end = whole["logs"][-1]["step"]
        losses = [entry["loss"] for entry in whole["logs"] if "loss" in entry][int(RESUMED[case][-1]) :]
        assert resumed["logs"][-1]["train_loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-6)
        kept = [{k: v for k, v in entry.items() if "arrived" not in k} for entry in whole["logs"] if "loss" in entry]
        again = [{k: v for k, v in entry.items() if "arrived" not in k} for entry in resumed["logs"] if "loss" in entry]
        assert again == kept and again[-1]["step"] == end
