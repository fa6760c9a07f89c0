"""Hypervolume and gradient weights, by brute force. Values of the authors' code: test_vectors.py."""

import itertools
import random

import pytest
import torch

from align.objectives.meta_apo import meta_weight
from align.objectives.reward_weighting import (
    gradient_weights,
    hypervolume,
    hypervolume_gain,
    hypervolume_multiplier,
)


def inclusion_exclusion(points, reference):
    """Volume of a union of boxes by the sum over all subsets."""
    total = 0.0
    for size in range(1, len(points) + 1):
        for subset in itertools.combinations(points, size):
            volume = 1.0
            for i, start in enumerate(reference):
                volume *= max(min(point[i] for point in subset) - start, 0.0)
            total += (-1) ** (size + 1) * volume
    return total


@pytest.mark.parametrize("dimensions", [1, 2, 3, 4])
def test_hypervolume_is_the_volume_of_the_union(dimensions):
    draw = random.Random(dimensions)
    for _ in range(20):
        points = [[draw.uniform(-0.3, 1) for _ in range(dimensions)] for _ in range(draw.randint(0, 6))]
        reference = [0.0] * dimensions
        assert hypervolume(points, reference) == pytest.approx(inclusion_exclusion(points, reference), abs=1e-12)
    assert hypervolume([[1.0] * dimensions] * 3, [0.0] * dimensions) == 1.0  # ties


def test_a_dominated_point_gains_nothing():
    front = [[0.8, 0.3], [0.4, 0.9]]
    assert hypervolume_gain(front, [0.3, 0.8], [0.0, 0.0], [True, True]) == 0
    assert hypervolume_gain([], [3.0, 2.0], [1.0, 4.0], [True, False]) == pytest.approx(4.0)
    assert hypervolume_multiplier(0.0) == 0.5 and hypervolume_multiplier(-1.0) == 0.5
    assert hypervolume_multiplier(1e9) == 2.0


def test_gradient_weights_follow_the_inner_products():
    weights, gradients = torch.tensor([0.5, 0.3, 0.2]), torch.randn(3, 7)
    influence = [sum(float(gradients[i] @ gradients[j]) for j in range(3)) for i in range(3)]
    unnormalised = weights * torch.exp(0.1 * torch.tensor(influence))
    moved = gradient_weights(weights, gradients, learning_rate=0.1, mu=1.0)
    torch.testing.assert_close(moved, unnormalised / unnormalised.sum())
    assert torch.allclose(gradient_weights(weights, torch.zeros(3, 7)), weights)
    # two objectives that agree gain on one that points the other way
    agreeing = torch.tensor([[1.0, 0.0], [1.0, 0.1], [-0.5, 0.0]])
    assert gradient_weights(torch.full((3,), 1 / 3), agreeing, learning_rate=1.0, mu=1.0)[2] < 1 / 3


def test_meta_weight_falls_for_badly_ranked_pairs():
    network = torch.full((100, 1), 0.1), torch.zeros(100), torch.full((1, 100), 0.1), torch.zeros(1)
    weights = meta_weight(torch.tensor([-1e4, -5.0, 0.0, 5.0, 1e4]), *network)
    assert weights.diff().gt(0).all() and weights[-1] == 0.5 and weights.isfinite().all()
