"""When a policy and its reference count as one model, in float32 and in 16 bits."""

import pytest
import torch

from align.errors import TrainingError
from align.trainers.core.reference_checks import check_reference, check_same_start


def gaps(count: int, mean: float) -> torch.Tensor:
    """Gaps of rounding, heavy in the tail as those of bf16 are: the largest grows with the count."""
    found = torch.distributions.Exponential(1.0).sample((count,)).square()
    return found * mean / 2


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def test_in_16_bits_the_mean_decides_whatever_the_number_of_tokens():
    healthy, mask = gaps(100_000, 0.02), torch.ones(100_000)
    assert healthy.max() > 0.5  # more than rounding of one token, and right
    check_same_start(healthy, torch.zeros_like(healthy), mask, 0.3)
    other = gaps(30, 0.2)
    with pytest.raises(TrainingError, match=r"differ by 0\.\d+ nats on average over 30 tokens \(allowed 0.05\)"):
        check_same_start(other, torch.zeros_like(other), torch.ones(30), 0.3)


def test_in_float32_one_token_is_enough():
    logps = torch.zeros(2, 1000)
    logps[1, 7] = 0.0011
    mask = torch.ones(2, 1000)
    with pytest.raises(TrainingError, match=r"differ by 0.0011 nats on one token \(allowed 0.001\)"):
        check_same_start(logps, torch.zeros(2, 1000), mask, 1e-3)
    mask[1, 7] = 0
    check_same_start(logps, torch.zeros(2, 1000), mask, 1e-3)


@pytest.mark.parametrize("tolerance", [1e-3, 0.3])
def test_numbers_that_are_not_finite_are_no_rounding(tolerance):
    with pytest.raises(TrainingError, match="the policy and its reference differ by nan"):
        check_same_start(torch.tensor([torch.nan, 0.0]), torch.zeros(2), torch.ones(2), tolerance)


def test_the_reference_of_a_resumed_run():
    check_reference(torch.zeros(15), torch.full((15,), 5e-4), 1e-3)
    check_reference(torch.zeros(15), torch.tensor([0.4] + [0.0] * 14), 0.3)
    for tolerance in (1e-3, 0.3):
        with pytest.raises(TrainingError, match="the reference is not the one of the run that is resumed"):
            check_reference(torch.zeros(15), torch.full((15,), 0.2), tolerance)
