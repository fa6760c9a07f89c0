"""From token values to what the losses look at."""

import pytest
import torch

from align.objectives.pair_logps import length_weights, pair_logps, wpo_weights
from align.objectives.preference_objective import preference_objective

# two pairs; the first pair's completions have 4 and 2 tokens, the second's 1 and 3
MASK = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]])


def tokens(seed=0):
    return -torch.rand(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_sums_and_lengths():
    logps, ref, kl = tokens(0), tokens(1), -tokens(2)
    pairs = pair_logps(logps, MASK, ref, kl=kl)
    for values, chosen, rejected in (
        (logps, pairs.chosen, pairs.rejected),
        (ref, pairs.ref_chosen, pairs.ref_rejected),
        (kl, pairs.chosen_kl, pairs.rejected_kl),
    ):
        expected = [sum(v for v, m in zip(row, mask, strict=True) if m) for row, mask in zip(values, MASK, strict=True)]
        torch.testing.assert_close(torch.cat([chosen, rejected]), torch.stack(expected))
    assert pairs.chosen_length.tolist() == [4, 1] and pairs.rejected_length.tolist() == [2, 3]
    assert torch.equal(pairs.nll, -pairs.chosen)
    assert pair_logps(logps, MASK).ref_chosen is None


@pytest.mark.parametrize("ld_alpha", [None, 0.5])
def test_what_is_outside_the_mask_does_not_count(ld_alpha):
    clean, ref = tokens().requires_grad_(), tokens(1)
    dirty = clean.detach().masked_fill(MASK == 0, torch.nan).requires_grad_()
    results = [pair_logps(x, MASK, ref.masked_fill(MASK == 0, torch.inf), ld_alpha=ld_alpha) for x in (clean, dirty)]
    for pairs, leaf in zip(results, (clean, dirty), strict=True):
        (pairs.delta.square().sum() + pairs.nll.sum()).backward()
        assert (leaf.grad[MASK == 0] == 0).all()
    torch.testing.assert_close(dirty.grad, clean.grad, rtol=0, atol=0)
    torch.testing.assert_close(results[1].delta, results[0].delta, rtol=0, atol=0)


def test_ld_alpha_weighs_the_tokens_beyond_the_shorter_completion():
    a = 0.3
    expected = torch.tensor([[1, 1, a, a], [1, a, a, a], [1, 1, a, a], [1, a, a, a]])
    weights = length_weights(MASK, a)
    assert torch.equal(weights[MASK.bool()], expected[MASK.bool()])
    logps, ref = tokens(0), tokens(1)
    pairs = pair_logps(logps, MASK, ref, ld_alpha=a)
    sums = (logps * expected * MASK).sum(-1), (ref * expected * MASK).sum(-1)
    torch.testing.assert_close(torch.cat([pairs.chosen_ratio, pairs.rejected_ratio]), sums[0] - sums[1])
    whole = pair_logps(logps, MASK, ref)
    assert torch.equal(pairs.nll, -whole.chosen) and torch.equal(pairs.chosen_length, whole.chosen_length)
    assert torch.equal(pair_logps(logps, MASK, ref, ld_alpha=1.0).delta, whole.delta)


def test_ld_alpha_finds_completions_wherever_they_start():
    shifted = torch.tensor([[0, 1, 1, 0], [0, 1, 1, 1]])  # one pair, two tokens against three, after a prompt
    assert length_weights(shifted, 0.0)[shifted.bool()].tolist() == [1, 1, 1, 1, 0]


def test_wpo_weighs_by_the_policy_s_own_probability():
    logits = torch.randn(4, 4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    probs = logits.softmax(-1).requires_grad_()
    ids = torch.arange(16).view(4, 4) % 9
    logps = probs.gather(-1, ids.unsqueeze(-1)).squeeze(-1).log()
    weights = wpo_weights(logps, probs.square().sum(-1).log(), MASK)
    assert not weights.requires_grad
    for pair in range(2):
        expected = 1.0
        for row in (pair, pair + 2):
            length = int(MASK[row].sum())
            aligned = [probs[row, t, ids[row, t]] / (probs[row, t] ** 2).sum() for t in range(length)]
            expected *= torch.stack(aligned).prod() ** (1 / length)
        torch.testing.assert_close(weights[pair], expected)


def test_weights_and_modifiers_reach_the_losses():
    logps, ref, weights = tokens(0), tokens(1), torch.tensor([0.5, 2.0], dtype=torch.float64)
    objective = preference_objective(["sigmoid", "sft"], [1.0, 0.2], {"use_weighting": True, "ld_alpha": 0.5})
    pairs = objective.pairs(logps, MASK, ref, mean_chosen_length=torch.tensor(10.0))
    parts = objective.parts(pairs)
    torch.testing.assert_close(parts["sft"], -(logps * MASK).sum(-1)[:2] / 10)
    torch.testing.assert_close(parts["sigmoid"], -torch.nn.functional.logsigmoid(0.1 * pairs.delta))
    torch.testing.assert_close(objective(pairs, weights).losses, weights * (parts["sigmoid"] + 0.2 * parts["sft"]))
    forward = preference_objective("sigmoid", None, {"f_divergence_type": "forward_kl"}).pairs(logps, MASK, ref)
    torch.testing.assert_close(forward.chosen_score, 1 - torch.exp(-forward.chosen_ratio))
