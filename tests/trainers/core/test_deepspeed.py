"""Under DeepSpeed's ZeRO-2 and ZeRO-3, on two processes (gloo), training is that of one process, and resumes exactly.

Needs DeepSpeed, which align does not install: `make test-deepspeed` has it in a folder of its own.
"""

import importlib.util
import math

import pytest
import torch

from tests.trainers.core.deepspeed_ranks import CASES, IN_BFLOAT16, RESUMED, train
from tests.trainers.core.test_fsdp2 import weights
from tests.trainers.tiny_runs import discriminator, tiny_model
from tests.trainers.two_processes import run_on_two

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("DeepSpeed is not installed: make test-deepspeed", allow_module_level=True)
SETUPS = ("zero2", "zero3")
NOT_UNDER_ZERO3 = ("remax",)  # of which the engine is transformers'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("deepspeed")


@pytest.fixture(scope="module")
def models(folder, tokenizer) -> str:
    """A policy, another one (`_other`) and a reward model (`_reward`)."""
    made = {
        "": tiny_model(tokenizer),
        "_other": tiny_model(tokenizer, seed=3),
        "_reward": discriminator(tokenizer).model,
    }
    for name, model in made.items():
        model.bfloat16().float()  # weights that bfloat16 holds exactly, so that runs in it start from the same ones
        model.save_pretrained(f"{folder}/policy{name}")
        tokenizer.save_pretrained(f"{folder}/policy{name}")
    return f"{folder}/policy"


@pytest.fixture(scope="module")
def one(folder, models):
    return train(models, folder / "one", [*CASES, *IN_BFLOAT16])


@pytest.fixture(scope="module")
def runs(folder, models):
    """By setup, of both processes."""
    return {setup: run_on_two("tests.trainers.core.deepspeed_ranks", folder / setup, models, setup) for setup in SETUPS}


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_run_of_one_process(one, runs, folder, setup, case):
    first, second = (run[case] for run in runs[setup])
    assert first == second
    if setup == "zero3" and case in NOT_UNDER_ZERO3:
        assert "the transformers rollout engine does not work with DeepSpeed ZeRO-3" in first["refused"]
        return
    assert first.keys() == one[case].keys()
    for key, values in one[case].items():
        assert first[key] == pytest.approx(values, rel=1e-4, abs=2e-5), key
    trained, split = (weights(folder / where / case / "final") for where in ("one", setup))
    torch.testing.assert_close(split, trained, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("case", RESUMED)
def test_it_resumes_exactly(runs, folder, setup, case):
    first = runs[setup][0]
    assert first[f"{case} resumed"] == first[case]
    whole, resumed = (weights(folder / setup / name / "final") for name in (case, f"{case} resumed"))
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)


@pytest.mark.parametrize("setup", SETUPS)
def test_a_longer_run_goes_on_with_its_own_schedule(runs, setup):
    """Its first step had the rate that the finished run ended with, which is 0: the step's rows were lost."""
    found = runs[setup][0]["longer"]["learning_rate"]
    assert found[6:] == pytest.approx([5e-3 * (1 + math.cos(math.pi * done / 6)) / 2 for done in (4, 5)])


@pytest.mark.parametrize("setup", SETUPS)
def test_another_learning_rate_is_refused(runs, setup):
    first, second = (run["rate"]["refused"] for run in runs[setup])
    assert first == second and "learning_rate: DeepSpeed loads the optimiser with its settings" in first


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("case", IN_BFLOAT16)
def test_masks_and_heads_train_beside_a_model_in_bfloat16(one, runs, setup, case):
    """ZeRO-3 laid them in one buffer with the model, and ended in an assertion of its own."""
    first = runs[setup][0][case]
    for key in ("loss", "grad_norm"):
        distance = (torch.tensor(first[key]) - torch.tensor(one[case][key])).abs()
        assert distance.max() < 0.015 * torch.tensor(one[case][key]).abs().max().clamp(min=0.5), key


def test_cached_log_probs_are_not_rounded(runs):
    """transformers gives DeepSpeed's batches in bfloat16, where -26 nats have steps of 0.125."""
    zero2, zero3 = (runs[setup][0]["cached, bf16"] for setup in SETUPS)
    assert zero2["loss"][0] == pytest.approx(math.log(2), abs=1e-6)
    assert "precompute_ref_log_probs does not work under ZeRO-3" in zero3["refused"]


@pytest.mark.parametrize("setup", SETUPS)
def test_what_does_not_work_is_refused(runs, setup):
    first, second = runs[setup]
    assert "the critic of PPO is trained with DDP or FSDP2" in first["ppo"]["refused"]
    assert first["refusals"] == second["refusals"]
    assert "is of another run (model: " in first["refusals"]["other model"]
    assert "max_grad_norm 1.0 would have no effect" in first["refusals"]["own file"]
