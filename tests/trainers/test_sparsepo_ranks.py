"""Two processes (gloo) train policy and masks as one does."""

import pytest

from tests.trainers.pairs.preference_runs import assert_close
from tests.trainers.sparse_ranks import CASES, train
from tests.trainers.tiny_runs import assert_same
from tests.trainers.two_processes import run_on_two


@pytest.fixture(scope="module")
def runs(policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sparse_ranks")
    one = train(policy, folder / "one", 1)
    return one, *run_on_two("tests.trainers.sparse_ranks", folder / "two", policy)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one(runs, case):
    one, first, second = (run[case] for run in runs)
    assert len(one["logs"]["loss"]) == 4
    assert_close(first["logs"], one["logs"], rtol=5e-5, atol=5e-6)
    assert_same(first["weights"], second["weights"])
    assert any("token_masks" in name for name in one["weights"]) is (case != "mapo")
    for name, weight in one["weights"].items():
        # before the first step the KL is rounding alone, and Adam makes a step of 1e-3 of the masks' gradients from it
        gap = (first["weights"][name] - weight).abs()
        assert gap.mean() < 1e-4 and gap.max() < 1e-3, f"{name}: {gap.mean()}, {gap.max()}"


def test_sharded_masks_get_the_gradients_of_one_process(runs):
    assert max(run["largest difference under FSDP2"] for run in runs[1:]) < 1e-12
