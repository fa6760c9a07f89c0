"""beta-DPO's running values, its drawing, and their state. Values of the authors' code: test_vectors.py."""

import itertools
import math

import pytest
import torch

from align.errors import ConfigError
from align.objectives.beta_dpo import BetaDPOState, RunningMoments, beta_dpo, log_sampling_weights
from align.objectives.dpo import sigmoid
from align.objectives.preference_objective import preference_objective
from tests.objectives.pair_cases import random_pairs


def gaps(count, seed=0, scale=2.0, shift=1.0):
    return torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale + shift


def test_corrected_moments_start_at_the_first_batch():
    corrected, released = RunningMoments(), RunningMoments(corrected=False)
    first, second = gaps(8), gaps(8, seed=1)
    for moments in (corrected, released):
        moments.update(first)
    assert corrected.mean == pytest.approx(first.mean().item()) and corrected.std == pytest.approx(first.std().item())
    assert released.mean == pytest.approx(first.mean().item() / 10)
    corrected.update(second)
    assert corrected.mean == pytest.approx(((0.09 * first.mean() + 0.1 * second.mean()) / 0.19).item())
    before = corrected.mean, corrected.std
    corrected.update(gaps(1))  # has no standard deviation
    assert (corrected.mean, corrected.std) == before


def test_the_released_start_throws_most_of_a_batch_away():
    """What the correction is for: effective sample size of the first batch of 64."""
    batch = gaps(64, scale=3.0)
    sizes = {}
    for preset in ("corrected", "released"):
        state = BetaDPOState(beta_dpo_preset=preset)
        state.moments.update(batch)
        q = log_sampling_weights(batch, state.moments.mean, state.moments.std).exp()
        sizes[preset] = (q.sum() ** 2 / q.square().sum()).item()
        if preset == "released":  # and torch.multinomial returns pairs that have no weight at all
            assert (q[state.draw(batch)] < 1e-12).any()
    assert sizes["corrected"] > 40 and sizes["released"] < 15


def test_the_draw_is_without_replacement_in_proportion_to_the_weights():
    """Against the probability of every subset, by enumeration of the orders it can be drawn in."""
    # far from the mean on one side: a draw by other noise would differ by nine deviations of these counts
    batch, count = torch.tensor([0.0, 1.5, 2.0, 2.5], dtype=torch.float64), 2
    state = BetaDPOState(beta_dpo_filter=0.5, beta_dpo_momentum=0.0, seed=1)
    state.moments.sums, state.moments.steps = (0.0, 1.0), 1
    q = log_sampling_weights(batch, state.moments.mean, state.moments.std).exp().tolist()
    expected = {}
    for first, second in itertools.permutations(range(4), 2):
        subset = tuple(sorted((first, second)))
        rest = sum(q) - q[first]
        expected[subset] = expected.get(subset, 0) + q[first] / sum(q) * q[second] / rest
    draws = 4000
    seen = dict.fromkeys(expected, 0)
    for _ in range(draws):
        kept = state.draw(batch).nonzero().flatten().tolist()
        assert len(kept) == count
        seen[tuple(kept)] += 1 / draws
    for subset, probability in expected.items():
        assert seen[subset] == pytest.approx(probability, abs=4 * (probability * (1 - probability) / draws) ** 0.5)


def test_far_outliers_are_the_first_to_go():
    """Weights of e^-800 and e^-1250 underflow; their logarithms do not."""
    batch = torch.cat([gaps(8, scale=0.1), torch.tensor([40.0, 50.0], dtype=torch.float64)])
    state = BetaDPOState(beta_dpo_filter=0.1)
    state.moments.sums, state.moments.steps = (0.1, 0.1), 1
    kept = state.draw(batch)
    assert kept.sum() == 9 and not kept[9]


@pytest.mark.parametrize(("share", "expected"), [(0.9, 1), (0.7, 3), (0.2, 8), (0.99, 1), (0.0, 10)])
def test_how_many_are_kept(share, expected):
    assert BetaDPOState(beta_dpo_filter=share).step([gaps(10)]).weights.count_nonzero() == expected


def test_at_the_first_step_all_gaps_are_zero():
    """Policy = reference: the standard deviation is 0, and the authors' 0/0 would be NaN."""
    draw = BetaDPOState().step([torch.zeros(10)])
    assert draw.weights.count_nonzero() == 8 and draw.beta == pytest.approx(0.1)
    weights = log_sampling_weights(torch.tensor([0.0, 1e-3], dtype=torch.float64), 0.0, 0.0)
    assert weights[0] == 0 and -math.inf < weights[1] < -1e9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_filter_and_sensitivity_it_is_dpo(dtype):
    pairs = random_pairs(dtype=dtype)
    state = BetaDPOState(beta=0.3, beta_dpo_alpha=0.0, beta_dpo_filter=0.0)
    for draw in (state.step([pairs.delta.detach()]), None):
        losses = beta_dpo(pairs, beta=0.3, draw=draw)
        assert losses.dtype == dtype
        torch.testing.assert_close(losses, sigmoid(pairs, beta=0.3))


def test_beta_follows_the_batch_and_has_no_gradient():
    state = BetaDPOState(beta=0.1, beta_dpo_alpha=0.6, beta_dpo_filter=0.0)
    state.moments.sums, state.moments.steps = (0.1, 0.1), 1  # mean 1, std 1
    batch = gaps(50, shift=3.0).requires_grad_()
    draw = state.step([batch])
    mean = (0.9 * 0.1 + 0.1 * batch.mean().item()) / 0.19
    assert draw.beta.item() == pytest.approx(0.1 * (1 + 0.6 * (batch.mean().item() - mean)))
    assert draw.beta > 0.1 and not draw.beta.requires_grad
    assert BetaDPOState(beta_dpo_alpha=1e3).step([gaps(10)]).beta >= 1e-3


def test_processes_draw_the_same_and_weigh_pairs_alike():
    """Two processes with 3 and 7 pairs train on what one with 10 does."""
    batch = gaps(10)
    whole = BetaDPOState(seed=5).step([batch])
    parts = [BetaDPOState(seed=5).step([batch[:3], batch[3:]], rank) for rank in (0, 1)]
    assert torch.equal(torch.cat([part.weights for part in parts]), whole.weights)
    assert whole.weights.sum() == 10 and all(part.beta == whole.beta for part in parts)
    released = [BetaDPOState(seed=5, beta_dpo_preset="released").step([batch[:3], batch[3:]], r) for r in (0, 1)]
    assert [part.weights.sum().item() for part in released] == pytest.approx([3, 7])  # a mean per process


def test_the_state_continues_exactly():
    first, second = BetaDPOState(seed=3), BetaDPOState(seed=4)
    first.step([gaps(10)])
    second.load_state_dict(first.state_dict())
    for seed in range(1, 4):
        draws = [state.step([gaps(10, seed)]) for state in (first, second)]
        assert torch.equal(draws[0].weights, draws[1].weights) and draws[0].beta == draws[1].beta


def test_the_objective_keeps_the_state_and_evaluates_without_it():
    objective = preference_objective(["beta_dpo", "sft"], [1.0, 0.1], {"beta": 0.2, "beta_dpo_filter": 0.4}, seed=7)
    pairs = random_pairs(10)
    draws = objective.draw(pairs)
    same = BetaDPOState(beta=0.2, beta_dpo_filter=0.4, seed=7).step([pairs.delta.detach()])
    assert torch.equal(draws["beta_dpo"].weights, same.weights)
    assert (objective.parts(pairs, draws)["beta_dpo"] == 0).sum() == 4
    before = objective.states["beta_dpo"].state_dict()["steps"]
    torch.testing.assert_close(objective.parts(pairs)["beta_dpo"], sigmoid(pairs, beta=0.2))
    assert objective.states["beta_dpo"].state_dict()["steps"] == before == 1
    two = preference_objective("beta_dpo", None, {}, seed=7)
    elsewhere = two.draw(pairs, lambda mine: ([torch.zeros(4), mine], 1))
    assert len(elsewhere["beta_dpo"].weights) == 10


def test_options_are_checked():
    for given in ({"beta_dpo_filter": 1.0}, {"beta_dpo_preset": "paper"}, {"beta_dpo_momentum": -0.1}):
        with pytest.raises(ConfigError, match=f"^{next(iter(given))} must be"):
            preference_objective("beta_dpo", None, given)
