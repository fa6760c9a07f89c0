"""Two processes (gloo), with DDP and with FSDP2, learn the multipliers, weights and thresholds that one learns."""

import pytest
import torch

from tests.trainers.tiny_runs import assert_same
from tests.trainers.two_processes import run_on_two
from tests.trainers.weighting.constrained_ranks import RUNS, SHARDED, train


@pytest.fixture(scope="module")
def runs(policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("constrained")
    one = train(policy, folder / "one", 1)
    return one, *run_on_two("tests.trainers.weighting.constrained_ranks", folder / "two", policy)


@pytest.mark.parametrize("name", [*RUNS, *SHARDED])
def test_two_processes_learn_what_one_learns(runs, name):
    one, first, second = (run[n] for run, n in zip(runs, (name.removesuffix(", fsdp2"), name, name), strict=True))
    assert_same(first["weights"], second["weights"])
    assert len(one["logs"]) == len(first["logs"]) > 4
    learned = 0
    for alone, together in zip(one["logs"], first["logs"], strict=True):
        assert alone.keys() == together.keys()
        learned += sum(key.startswith(("constraints/", "dynamic_weights/")) for key in alone)
        for key, value in alone.items():
            if "influence" in key or not isinstance(value, float):
                continue
            assert together[key] == pytest.approx(value, rel=2e-3, abs=2e-4), key
    assert learned >= 8
    for parameter, expected in one["weights"].items():
        torch.testing.assert_close(first["weights"][parameter], expected, rtol=1e-3, atol=1e-4)
