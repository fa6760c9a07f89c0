"""The mean of each estimator's gradients against the exact one, and the biases that the documentation states."""

import pytest
import torch

from tests.trainers.on_policy.enumerable import deviations, estimates, exact_gradient, small_world

PLAIN_PPO = {"num_iterations": 1, "lam": 1.0, "whiten_advantages": False}  # its critic starts at 0: REINFORCE


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("remax", {}),
        ("rloo", {}),
        (
            "rloo",
            {"num_generations": 4, "importance_sampling_level": "sequence_sum", "loss_aggregation": "sequence_mean"},
        ),
        ("ppo", PLAIN_PPO),
    ],
)
def test_unbiased(method, options, tmp_path):
    trainer = small_world(tmp_path, method, **options)
    exact, found = exact_gradient(trainer), estimates(trainer)
    z = deviations(found, exact)
    assert abs(z[0]) < 4 and z.abs().max() < 4.5 and 0.1 < z.square().mean() < 2, z
    if options.get("num_generations", 64) == 64 and method != "ppo":
        error = (found @ (exact / exact.norm()).double()).std() / len(found) ** 0.5
        assert error < 0.04 * exact.norm()  # the test would see a bias of 16 %


def test_the_group_mean_as_baseline_shrinks_the_gradient(tmp_path):
    """Dr. GRPO subtracts a mean that holds the sample itself: (n - 1) / n of the gradient."""
    options = {"scale_rewards": "none", "num_generations": 3, "beta": 0.0}
    trainer = small_world(tmp_path, "grpo", **options)
    exact, found = exact_gradient(trainer), estimates(trainer, count=300)
    assert abs(deviations(found * 3 / 2, exact)[0]) < 4
    assert abs(deviations(found, exact)[0]) > 4


@pytest.mark.parametrize(("method", "options"), [("grpo", {"beta": 0.0}), ("reinforce_pp", {"beta": 0.2})])
def test_division_by_the_deviation_changes_the_scale(method, options, tmp_path):
    trainer = small_world(tmp_path, method, **options)
    exact, found = exact_gradient(trainer), estimates(trainer)
    assert abs(deviations(found, exact)[0]) > 10
    cosine = torch.cosine_similarity(found.mean(0), exact.double(), dim=0)
    assert cosine > 0.8  # the direction is nearly kept


def test_the_greedy_baseline_lowers_the_variance(tmp_path):
    """ReMax against REINFORCE (PPO's first step with a critic that says 0), same prompts, same number of samples."""
    remax = estimates(small_world(tmp_path / "remax")).var(0).sum()
    reinforce = estimates(small_world(tmp_path / "ppo", "ppo", **PLAIN_PPO)).var(0).sum()
    assert remax < 0.8 * reinforce, (remax, reinforce)


def test_k2_in_the_loss_leaves_out_what_a_token_leads_to(tmp_path):
    """The gradient of each token's KL, not of the later tokens' that it decides: biased for more than one token."""
    trainer = small_world(tmp_path, "rloo", kl_in="loss", beta=2.0)
    assert deviations(estimates(trainer), exact_gradient(trainer)).abs().max() > 6
