"""Bradley-Terry with a probability as label, and what calibration says of it."""

import numpy as np
import pytest
import torch

from align.evaluation.calibration import pair_confidence, reliability
from align.objectives.reward_model import bradley_terry_loss


def scores(n=50, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=generator, dtype=torch.float64) * 3 for _ in range(3)]


def test_cross_entropy():
    chosen, rejected, margin = scores()
    p = torch.rand(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(chosen - rejected - margin, p, reduction="none")
    torch.testing.assert_close(bradley_terry_loss(chosen, rejected, margin, p), expected, rtol=1e-12, atol=1e-12)
    # 1 is a hard label, 0 the pair turned round
    hard = bradley_terry_loss(chosen, rejected)
    torch.testing.assert_close(bradley_terry_loss(chosen, rejected, chosen_prob=torch.ones(50)), hard)
    turned = bradley_terry_loss(rejected, chosen)
    torch.testing.assert_close(bradley_terry_loss(chosen, rejected, chosen_prob=torch.zeros(50)), turned)
    # members: scores [K, B], labels [B]
    both = bradley_terry_loss(torch.stack([chosen, rejected]), torch.stack([rejected, chosen]), chosen_prob=p)
    torch.testing.assert_close(both[0], bradley_terry_loss(chosen, rejected, chosen_prob=p))


def test_least_where_the_model_says_the_label():
    p = torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64)
    difference = torch.logit(p).requires_grad_()
    (gradient,) = torch.autograd.grad(bradley_terry_loss(difference, torch.zeros(3), chosen_prob=p).sum(), difference)
    torch.testing.assert_close(gradient, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)


def test_far_from_zero():
    chosen, p = torch.tensor([400.0, -400.0]), torch.tensor([0.25, 0.25])
    assert bradley_terry_loss(chosen, torch.zeros(2), chosen_prob=p).tolist() == [300.0, 100.0]


def test_calibration_with_soft_labels():
    """A soft label is the expectation over hard ones."""
    rng = np.random.default_rng(0)
    margins = rng.normal(0.5, 1.5, 300)
    p = rng.uniform(size=300)
    confidence, correct = pair_confidence(margins, p)
    assert correct == pytest.approx(np.where(margins > 0, p, 1 - p))
    draws = (rng.uniform(size=(4000, 300)) < p).astype(float)
    mean = np.mean([pair_confidence(margins, draw)[1] for draw in draws], axis=0)
    assert correct == pytest.approx(mean, abs=0.05)
    assert reliability(margins, labels=np.ones(300)).ece == reliability(margins).ece
    true = 1 / (1 + np.exp(-margins))
    assert reliability(margins, labels=true).ece == pytest.approx(0, abs=1e-12)
    assert reliability(2 * margins, labels=true).ece > 0.05
    assert pair_confidence(np.zeros(1), np.array([0.9])) == (0.5, 0.5)  # a tie is half right
