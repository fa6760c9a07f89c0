"""INPO's population loss over an enumerable world is smallest at the step of mirror descent."""

import torch

from align.objectives.dpo import ipo_sum
from align.objectives.inpo import inpo_reference
from align.objectives.pair_logps import PairLogps


def test_the_minimum_over_pairs_of_the_old_policy_is_the_closed_form():
    generator = torch.Generator().manual_seed(0)
    count, eta, tau = 5, 0.4, 0.1
    ref, old = (torch.randn(count, generator=generator, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    wins = torch.rand(count, count, generator=generator, dtype=torch.float64)
    wins = (wins + 1 - wins.T) / 2  # P(a > b) = 1 - P(b > a)
    share = 1 - tau / eta
    mixed = inpo_reference(ref, old, share)
    first, second = torch.cartesian_prod(torch.arange(count), torch.arange(count)).T
    drawn = (old[first] + old[second]).exp() * wins[first, second] * 2  # first wins; the others are its mirror
    logits = torch.zeros(count, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=300, tolerance_grad=1e-12, tolerance_change=0)

    def loss():
        optimizer.zero_grad()
        logps, length = logits.log_softmax(-1), torch.ones_like(first)
        pairs = PairLogps(logps[first], logps[second], mixed[first], mixed[second], length, length)
        value = (drawn * ipo_sum(pairs, beta=eta)).sum()
        value.backward()
        return value

    optimizer.step(loss)
    expected = (tau / eta * ref + share * old + wins @ old.exp() / eta).softmax(-1)
    torch.testing.assert_close(logits.detach().softmax(-1), expected, rtol=0, atol=1e-7)
    assert (expected - (tau / eta * ref + share * old).softmax(-1)).abs().max() > 0.05
