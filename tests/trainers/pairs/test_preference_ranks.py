"""Two processes (gloo) train on pairs what one trains."""

import pytest
import torch

from tests.trainers.pairs.pair_ranks import CASES, train
from tests.trainers.pairs.preference_runs import assert_close
from tests.trainers.tiny_runs import assert_same
from tests.trainers.two_processes import run_on_two


@pytest.fixture(scope="module")
def runs(policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair_ranks")
    one = train(policy, folder / "one", 1)
    return one, *run_on_two("tests.trainers.pairs.pair_ranks", folder / "two", policy)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one(runs, case):
    one, first, second = (run[case] for run in runs)
    assert len(one["logs"]["loss"]) == 4
    assert_close(first["logs"], one["logs"], rtol=2e-5, atol=2e-6)
    assert_same(first["weights"], second["weights"])
    for name, weight in one["weights"].items():
        torch.testing.assert_close(first["weights"][name], weight, rtol=0, atol=2e-4, msg=name)
