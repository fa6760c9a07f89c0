"""SRPO's losses have the solution of its game for their minimum, in a world of five answers."""

import itertools

import pytest
import torch

from align.objectives.srpo import RevisionRatios, generator_loss, improver_loss, srpo_losses

ANSWERS, BETA = 5, 0.4


@pytest.fixture
def world():
    """P [a, b], not transitive; ref [a]; ref of the improver [b, a], of a after b; and the game's solution."""
    generator = torch.Generator().manual_seed(3)
    raw = torch.randn(ANSWERS, ANSWERS, generator=generator, dtype=torch.float64)
    preference = torch.sigmoid(2 * (raw - raw.T))
    assert not all(
        preference[a, c] > 0.5
        for a, b, c in itertools.permutations(range(ANSWERS), 3)
        if preference[a, b] > 0.5 and preference[b, c] > 0.5
    )
    ref = torch.randn(ANSWERS, generator=generator, dtype=torch.float64).softmax(-1)
    ref_after = torch.randn(ANSWERS, ANSWERS, generator=generator, dtype=torch.float64).softmax(-1)
    weighted = ref_after * torch.exp(preference.T / BETA)
    improver = weighted / weighted.sum(-1, keepdim=True)
    policy = ref / weighted.sum(-1)
    return preference, ref, ref_after, policy / policy.sum(), improver


def all_pairs(preference, ref, ref_after, policy, improver, drawn):
    """The ratios of every labelled pair w, l, and the probability of each: that it is drawn, times that of the label.
    drawn: [a, b], symmetric."""
    pairs = [(a, b) for a in range(ANSWERS) for b in range(ANSWERS) if a != b]
    won, lost = (torch.tensor(side) for side in zip(*pairs, strict=True))
    plain, after = policy.log() - ref.log(), improver.log() - ref_after.log()
    ratios = RevisionRatios(
        plain[won], plain[lost], after[won, won], after[won, lost], after[lost, won], after[lost, lost]
    )
    return ratios, drawn[won, lost] * preference[won, lost]


def drawn_somehow():
    weights = torch.rand(ANSWERS, ANSWERS, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return weights + weights.T


def test_the_stated_identities_hold_at_the_solution(world):
    preference, ref, ref_after, policy, improver = world
    plain, after = policy.log() - ref.log(), improver.log() - ref_after.log()
    for a, b in itertools.permutations(range(ANSWERS), 2):
        assert BETA * (after[b, a] - after[b, b]).item() == pytest.approx(preference[a, b].item() - 0.5, abs=1e-12)
        both = after[b, a] - after[a, b] + plain[a] - plain[b]
        assert BETA * both.item() == pytest.approx(2 * preference[a, b].item() - 1, abs=1e-12)
    difference = plain - after.diagonal()  # R(a) is G(a|a) but for a constant
    torch.testing.assert_close(difference, difference[:1].expand(ANSWERS))


def test_nobody_gains_by_leaving_the_solution(world):
    """It is the game's saddle point: the improver's value cannot be raised, nor, against its answer, lowered."""
    preference, ref, ref_after, policy, improver = world

    def value(policy, improver):
        wins = (improver * preference.T).sum(-1)
        kl_after = (improver * (improver / ref_after).log()).sum(-1)
        return (policy * (wins - BETA * kl_after)).sum() + BETA * (policy * (policy / ref).log()).sum()

    solved = value(policy, improver)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        noise = 0.3 * torch.randn(ANSWERS, ANSWERS, generator=generator, dtype=torch.float64)
        assert value(policy, (improver.log() + noise).softmax(-1)) < solved
        assert value((policy.log() + noise[0]).softmax(-1), improver) > solved


@pytest.mark.parametrize("loss", [generator_loss, improver_loss])
def test_the_gradient_of_each_loss_vanishes_there(loss, world):
    """However the pairs are drawn, and not elsewhere."""
    preference, ref, ref_after, policy, improver = world
    for at, still in ((0.0, True), (0.2, False)):
        generator = torch.Generator().manual_seed(2)
        noise = at * torch.randn(ANSWERS + 1, ANSWERS, generator=generator, dtype=torch.float64)
        logits = (policy.log() + noise[0]).requires_grad_()
        logits_after = (improver.log() + noise[1:]).requires_grad_()
        ratios, probability = all_pairs(
            preference, ref, ref_after, logits.softmax(-1), logits_after.softmax(-1), drawn_somehow()
        )
        (probability * loss(ratios, beta=BETA)).sum().backward()
        largest = max(0 if p.grad is None else p.grad.abs().max().item() for p in (logits, logits_after))
        assert (largest < 1e-12) is still and (still or largest > 1e-3), largest


@pytest.mark.parametrize("weight", [0.2, 0.5, 0.8])
def test_training_ends_in_the_solution(weight, world):
    preference, ref, ref_after, policy, improver = world
    logits = torch.zeros(ANSWERS, dtype=torch.float64, requires_grad=True)
    logits_after = torch.zeros(ANSWERS, ANSWERS, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [logits, logits_after], max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-12
    )

    def closure():
        optimizer.zero_grad()
        ratios, probability = all_pairs(
            preference, ref, ref_after, logits.softmax(-1), logits_after.softmax(-1), drawn_somehow()
        )
        loss = (probability * srpo_losses(ratios, beta=BETA, improver_weight=weight).losses).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(logits.softmax(-1), policy, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(logits_after.softmax(-1), improver, rtol=1e-4, atol=1e-6)


def test_the_values_of_one_pair():
    """By hand: beta 0.5, G(w|l) - G(l|l) = 1, G(l|w) - G(w|w) = -2, R(w) - R(l) = 0.5, G(w|l) - G(l|w) = 1."""
    one = {"chosen": 0.7, "rejected": 0.2, "chosen_again": 1.0, "rejected_after_chosen": -1.0}
    one |= {"chosen_after_rejected": 0.0, "rejected_again": -1.0}
    found = srpo_losses(
        RevisionRatios(**{k: torch.tensor([v]) for k, v in one.items()}), beta=0.5, improver_weight=0.25
    )
    generator, improver = (0.5 * 1.5 - 1) ** 2, 0.5 * (0.0**2 + (-1 + 0.5) ** 2)
    assert found.metrics["generator/loss"].item() == pytest.approx(generator)
    assert found.metrics["improver/loss"].item() == pytest.approx(improver)
    assert found.losses.item() == pytest.approx(0.75 * generator + 0.25 * improver)
    assert found.metrics["improver/margins"].item() == pytest.approx(0.5 * 1.5)
    assert found.metrics["improver/accuracies"].item() == 1
    assert found.chosen_rewards.item() == pytest.approx(0.35) and found.rejected_rewards.item() == pytest.approx(0.1)
