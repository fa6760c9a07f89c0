"""Under FSDP2 (weights, gradients and optimiser states in two processes, read by the main one) training is the same."""

import pytest
import torch
from safetensors.torch import load_file

from tests.trainers.core.fsdp2_ranks import KEYS, RESUMED, train
from tests.trainers.two_processes import run_on_two

METHODS = (
    *(
        "sft",
        "sft, without padding",
        "sft, head beside an adapter",
        "half of it",
        "selected tokens",
        "implicit rewards",
        "implicit rewards, adapter",
        "dpo",
        "dpo, adapter",
        "dpo, adapter, cached",
        "listwise_dpo",
        "srpo",
        "sparsepo",
        "kto",
        "reward",
    ),
    *("remax", "game", "online_dpo", "d2po", "metaapo", "ppo"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fsdp2")


@pytest.fixture(scope="module")
def runs(request, policy, folder):
    """Of the methods that are asked for: all, or those of `-k` and of names on the command line."""
    asked = [item for item in request.session.items if item.path == request.path]
    methods = list(dict.fromkeys(item.callspec.params["method"] for item in asked))
    resumed = [item.callspec.params["method"] for item in asked if item.function is test_it_resumes_exactly]
    names = [*methods, *(f"{method} resumed" for method in resumed)]
    one = train(policy, folder / "one", *names)
    return one, *run_on_two("tests.trainers.core.fsdp2_ranks", folder / "two", policy, *names)


def weights(folder) -> dict[str, torch.Tensor]:
    (file,) = [path for path in folder.glob("*model.safetensors")]
    return load_file(file)


@pytest.mark.parametrize("method", METHODS)
def test_sharded_training_is_unsharded_training(runs, folder, method):
    one, first, second = (run[method] for run in runs)
    assert first == second and len(one["loss"]) == (8 if method == "ppo" else 4)
    for key in KEYS:
        assert first[key] == pytest.approx(one[key], rel=1e-4, abs=2e-5), key
    trained, sharded = (weights(folder / world / method / "final") for world in ("one", "two"))
    torch.testing.assert_close(sharded, trained, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", list(RESUMED))
def test_it_resumes_exactly(runs, folder, method):
    assert runs[1][f"{method} resumed"] == runs[1][method]
    whole, resumed = (weights(folder / "two" / name / "final") for name in (method, f"{method} resumed"))
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)
