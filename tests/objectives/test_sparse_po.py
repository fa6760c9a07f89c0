"""SparsePO's loss: TDPO1 at weight 1, closed forms, gradients, and nothing from outside the completion."""

import pytest
import torch

from align.objectives.preference import LOSSES, PairLogps
from align.objectives.sparse_po import MaskedSums, implicit_rewards, masked_sums, sparse_po_loss, sparsity

B, L, BETA = 3, 5, 0.3


def values(seed=0):
    """log-ratios, KL, completion mask and two sets of weights, [2B, L]."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(L) < torch.tensor([5, 2, 3, 1, 4, 5])[:, None]

    def draw():
        return torch.randn(2 * B, L, generator=generator, dtype=torch.float64)

    return draw() * mask, draw().abs() * mask, mask, draw().relu(), draw().relu()


def split(sums):
    halves = zip(*(value.chunk(2) for value in vars(sums).values()), strict=True)
    return [MaskedSums(*half) for half in halves]


def loss(*inputs, **options):
    return sparse_po_loss(*split(masked_sums(*inputs)), beta=BETA, **options)


def test_weight_one_is_tdpo1():
    """Value and gradients, against the function of the table of losses."""
    found = []
    for ones in (None, torch.ones(2 * B, L, dtype=torch.float64), "tdpo1"):
        ratios, kl, mask, *_ = values()
        ratios, kl = ratios.requires_grad_(), kl.requires_grad_()
        if isinstance(ones, str):
            (chosen, rejected), (kl_w, kl_l) = ratios.sum(-1).chunk(2), kl.sum(-1).chunk(2)
            lengths, zero = mask.sum(-1).chunk(2), torch.zeros(B, dtype=torch.float64)
            pairs = PairLogps(chosen, rejected, zero, zero, *lengths, chosen_kl=kl_w, rejected_kl=kl_l)
            losses = LOSSES["tdpo1"].function(pairs, beta=BETA)
        else:
            losses = loss(ratios, kl, mask, ones, ones)
        losses.sum().backward()
        found.append((losses.detach(), ratios.grad * mask, kl.grad * mask))
    for other in found[:2]:
        torch.testing.assert_close(other, found[2], rtol=1e-12, atol=1e-12)


def test_gradients_by_finite_differences():
    ratios, kl, mask, m_u, m_d = (v.requires_grad_() if v.is_floating_point() else v for v in values())
    torch.autograd.gradcheck(
        lambda *x: loss(x[0], x[1], mask, x[2] ** 2 + 0.1, x[3] ** 2 + 0.1, l1_u=0.2, l1_d=0.3), (ratios, kl, m_u, m_d)
    )


def test_signs():
    """Raising the chosen one's log-ratio or KL, or lowering the rejected one's, lowers the loss, in proportion to the
    weights; a weight grows where that helps."""
    ratios, kl, mask, m_u, m_d = (v.requires_grad_() if v.is_floating_point() else v for v in values())
    losses = loss(ratios, kl, mask, m_u, m_d)
    losses.sum().backward()
    pull = BETA * (1 - torch.exp(-losses.detach())).repeat(2)[:, None]  # sigmoid(-z) beta
    side = torch.tensor([1.0] * B + [-1.0] * B)[:, None]
    torch.testing.assert_close(ratios.grad, -side * pull * m_u.detach() * mask)
    torch.testing.assert_close(kl.grad, -side * pull * m_d.detach() * mask)
    torch.testing.assert_close(m_u.grad, -side * pull * ratios.detach() * mask)
    torch.testing.assert_close(m_d.grad, -side * pull * kl.detach() * mask)


def test_l1_sums_over_tokens_of_both_completions():
    ratios, kl, mask, m_u, m_d = values()
    difference = loss(ratios, kl, mask, m_u, m_d, l1_u=0.5, l1_d=2.0) - loss(ratios, kl, mask, m_u, m_d)
    expected = [
        sum(0.5 * m_u[row, t] + 2.0 * m_d[row, t] for row in (pair, pair + B) for t in range(L) if mask[row, t])
        for pair in range(B)
    ]
    torch.testing.assert_close(difference, torch.stack(expected))


def test_nothing_outside_the_completion_counts():
    ratios, kl, mask, m_u, m_d = values()
    expected = loss(ratios, kl, mask, m_u, m_d, l1_u=1.0)
    noise = torch.where(mask, 0.0, 7.0)
    torch.testing.assert_close(loss(ratios + noise, kl + noise, mask, m_u + noise, m_d, l1_u=1.0), expected)
    torch.testing.assert_close(sparsity(m_u + noise, mask), sparsity(m_u, mask))


def test_rewards_are_what_the_sigmoid_sees():
    inputs = values()
    chosen, rejected = split(masked_sums(*inputs))
    margins = implicit_rewards(chosen, BETA) - implicit_rewards(rejected, BETA)
    torch.testing.assert_close(-torch.nn.functional.logsigmoid(margins), loss(*inputs))


def test_sparsity():
    weights = torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.5, 0.1, 2.0, 0.0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0]])
    assert sparsity(weights, mask).tolist() == pytest.approx([2 / 3, 0.0])


def test_extreme_ratios_stay_finite():
    sums = MaskedSums(*(torch.tensor([v], dtype=torch.float64) for v in (1e6, 0.0, 0.0, 0.0)))
    other = MaskedSums(*(torch.tensor([v], dtype=torch.float64) for v in (-1e6, 0.0, 0.0, 0.0)))
    assert sparse_po_loss(sums, other, beta=1.0).item() == 0
    assert sparse_po_loss(other, sums, beta=1.0).item() == pytest.approx(2e6)


def test_nothing_outside_the_completion_counts_be_it_nan():
    """Nor does the size of the mask's numbers. A weight or log-ratio that was NaN there made the sums NaN."""
    ratios, kl, mask, m_u, m_d = values()
    expected = vars(masked_sums(ratios, kl, mask, m_u, m_d))
    broken = [one.masked_fill(~mask, float("nan")).requires_grad_() for one in (ratios, kl, m_u, m_d)]
    found = masked_sums(broken[0], broken[1], mask * 3, broken[2], broken[3])
    assert all(torch.equal(value, expected[name]) for name, value in vars(found).items())
    loss(broken[0], broken[1], mask, broken[2], broken[3], l1_u=0.1).sum().backward()
    assert all(one.grad.isfinite().all() for one in broken)
