"""Two processes (gloo) train on pairs what one trains, and compute reference log-probs together."""

import json

import pytest
import torch

from align.trainers.pairs.reference_cache import mark_of
from align.trainers.pairs.reference_shards import ReferenceShards
from tests.trainers.pairs.cache_ranks import logps, rows
from tests.trainers.pairs.pair_ranks import CASES, train
from tests.trainers.pairs.preference_runs import assert_same_run
from tests.trainers.tiny_runs import assert_same
from tests.trainers.two_processes import run_on_two
from tests.warm import run_ranks


@pytest.fixture(scope="module")
def runs(policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair_ranks")
    one = train(policy, folder / "one", 1)
    return one, *run_on_two("tests.trainers.pairs.pair_ranks", folder / "two", policy)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one(runs, case):
    one, first, second = (run[case] for run in runs)
    assert len(one["logs"]["loss"]) == 4
    assert_same_run(first["logs"], one["logs"])
    assert_same(first["weights"], second["weights"])
    for name, weight in one["weights"].items():
        torch.testing.assert_close(first["weights"][name], weight, rtol=0, atol=5e-4, msg=name)


@pytest.mark.parametrize("disks", ["one", "two"])
def test_the_shards_of_two_processes_become_one_file(disks, tmp_path):
    """With what a killed run had done; of a folder that they do not share, each has the file in its own."""
    data = rows(2500)  # gathered in two parts
    if disks == "one":
        name = f"train-{mark_of(data, 'weights', 'float32')}.shards"
        killed = ReferenceShards(tmp_path / "both" / name, 0, len(data))
        for number in range(100):
            killed.append(number, *logps(data[number], number))
        killed.close()
    run_ranks("tests.trainers.pairs.cache_ranks", str(tmp_path), "2500", disks, logs=tmp_path / "logs")
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert all(one["right"] and one["mapped"] == 1 for one in found), found
    assert found[0]["left"] == found[1]["left"] and len(found[0]["left"]) == 1
    assert [one["computed"] for one in found] == [1200 if disks == "one" else 1250] * 2
