"""Reward models on some ranks of a run alone: same scores, no weights elsewhere, and nobody waits for one that failed.

Whole runs with them: tests/trainers/on_policy/test_placed_runs.py.
"""

import json

import pytest
import torch

from align.errors import ConfigError
from align.modeling.members import share_trunk
from align.reward_models.build import build_reward
from align.reward_models.classifier import ClassifierReward
from align.reward_models.ensemble import save_ensemble
from align.reward_models.joint import save_trunk
from align.reward_models.margins import MarginRewards
from align.reward_models.normalizer import Normalizer
from align.reward_models.placement import Placement, shared_out
from align.reward_models.specs import parse_reward
from tests.modeling import tiny
from tests.reward_models import worlds
from tests.reward_models.test_implicit import saved, saved_adapter
from tests.warm import run_ranks


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What two processes have found, by rank."""
    folder = tmp_path_factory.mktemp("placed")
    for i, name in enumerate(("a", "b")):
        path = worlds.reward_folder(folder / name, seed=i)
        Normalizer(0.1 * i, 1.0 + i, 10, "a test").save(path)
    members = [folder / "saved" / name for name in ("member_0", "member_1")]
    for i, path in enumerate(members):
        worlds.reward_folder(path, seed=i)
        Normalizer(0.1 * i, 1.0 + i, 10, "a test").save(path)
    save_ensemble(folder / "saved", ["member_0", "member_1"])
    trunk = share_trunk(tiny.classifier(dtype=torch.float32), [1, 2], 1)
    save_trunk(trunk, folder / "trunk")
    worlds.tokenizer().save_pretrained(folder / "trunk")
    for name in ("member_0", "member_1"):
        (folder / "trunk" / name).mkdir()
        Normalizer(0.5, 2.0, 10, "a test").save(folder / "trunk" / name)
    save_ensemble(folder / "trunk", ["member_0", "member_1"], kind="shared_trunk", upper_layers=1)
    saved(folder / "dpo", seed=1)
    saved_adapter(folder / "dpo_lora", saved(folder / "sft"))
    run_ranks("tests.reward_models.placed_ranks", str(folder), logs=folder / "logs")
    return [json.loads((folder / f"found_{rank}.json").read_text()) for rank in (0, 1)]


HOLDERS = {
    "on 1": [1],
    "on both": [0, 1],
    "offloaded": [0],
    "implicit": [1],
    "adapter": [1],
    "saved": [1],
    "trunk": [1],
}
KINDS = [*HOLDERS, "members", "composite"]


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_a_model_in_every_process(found, kind):
    for rank in (0, 1):
        results = found[rank]["same"][kind]
        assert all(results.pop(share) for share in ("uneven", "empty", "all", "again", "placed", "mark")), results


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_named_ranks_hold_weights(found, kind):
    whole, held = ([found[rank]["same"][kind][name] for rank in (0, 1)] for name in ("whole", "held"))
    assert min(whole) > 1000
    if kind == "members":  # one on each
        assert held == [whole[0] // 2] * 2
    elif kind == "composite":  # the first on rank 1, the other in both
        assert held == [whole[0] // 2, whole[0]]
    else:
        assert held == [whole[rank] if rank in HOLDERS[kind] else 0 for rank in (0, 1)]


def test_an_error_of_one_rank_is_raised_in_all(found):
    first, second = (found[rank]["told"] for rank in (0, 1))
    assert (first.pop("rule beside it"), second.pop("rule beside it")) == (
        "RewardError: rank 1: ValueError: no",
        "ValueError: no",  # the user's own, with its traceback
    )
    assert first == second
    assert first["beyond"].startswith("ConfigError: reward 'a': ranks places its model on rank 2, and this run has 2 ")
    assert first["no model"].startswith("ConfigError: rank 1: ") and "is no reward model" in first["no model"]
    row = "reward 'a', row 1 of the batch (row 5 of the dataset): "
    assert first["too long on 0"].startswith(f"RewardError: rank 0: {row}the completion alone has ")
    assert (
        "rank 0: reward 'a' returned a non-finite score (nan) for rows [1] of the batch ([5] of the d"
        in (first["nan of 0"])
    )
    rows = "rows [0, 1] of the batch ([4, 5] of the dataset) of rank 0"
    assert first["broken owner"] == f"RewardError: rank 1: reward 'a', {rows}: OutOfMemoryError: no"
    assert first["begun beside it"] == "RewardError: rank 0: no"
    assert first["after all"] is None


def test_a_rank_that_has_ended_ends_the_others(found):
    assert found[0]["lost"].startswith(
        "RankLost: rewards on some ranks: a process of the run has ended, or did not answer"
    )


def test_zero3_is_refused(monkeypatch):
    monkeypatch.setattr("transformers.integrations.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ConfigError, match="ranks have not been tried with ZeRO-3"):
        Placement("r", [0])


def test_batches_are_shared_out_by_tokens():
    assert shared_out([[9, 4], [], [5, 5, 1]], 2) == [[(0, 0), (0, 1)], [(2, 0), (2, 1), (2, 2)]]
    (one,) = shared_out([[2], [3, 1]], 1)
    assert sorted(one) == [(0, 0), (1, 0), (1, 1)]
    assert shared_out([[7]], 3) == [[(0, 0)], [], []]


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        (1, r"rewards.ranks: ranks are a list .* such as \[1\], not 1"),
        ([], r"ranks are a list .* such as \[0\] or \[6, 7\], not \[\]"),
        ([-1], r"ranks are a list .*, not \[-1\]: ranks count from 0"),
        (["0"], "ranks are a list"),
        ([True], "ranks are a list"),
        ([1, 1], r"each once, not \[1, 1\]"),
    ],
)
def test_what_are_no_ranks(ranks, message):
    with pytest.raises(ConfigError, match=message):
        parse_reward({"type": "classifier", "path": "a", "ranks": ranks}, "rewards")


def test_where_there_is_nothing_to_place(tmp_path):
    with pytest.raises(ConfigError, match="r.ranks says which ranks load a model, and a remote reward has none of its"):
        parse_reward({"type": "remote", "url": "http://x", "ranks": [0]}, "r")
    with pytest.raises(ConfigError, match="a composite reward has none of its own: set it for each of its rewards"):
        parse_reward({"type": "composite", "rewards": ["a"], "ranks": [0]}, "r")
    with pytest.raises(ConfigError, match="ranks of an ensemble belong to path: set them for each of the members"):
        parse_reward({"type": "ensemble", "aggregation": "mean", "members": ["a"], "ranks": [0]})
    with pytest.raises(ConfigError, match="this one is loaded in each already: give its folder or hub name"):
        ClassifierReward(tiny.classifier(), tokenizer=worlds.tokenizer(), ranks=[0])


def test_one_process_is_every_process(tmp_path):
    spec = {"type": "classifier", "path": worlds.reward_folder(tmp_path / "a"), "ranks": [0]}
    reward = build_reward(spec)
    assert not reward.placed and reward.here
    with pytest.raises(ConfigError, match="on rank 6, and this run is 1 process, rank 0: name others, leave ranks out"):
        build_reward({**spec, "ranks": [0, 6]})


def test_margin_rewards_are_scored_by_all(tmp_path):
    class Placed(ClassifierReward):
        placed = True

    reward = Placed(worlds.reward_folder(tmp_path / "a"))
    with pytest.raises(ConfigError, match="scores the pairs once, before the training, and is freed then: leave ranks"):
        MarginRewards(reward, worlds.tokenizer(), None)
