"""Losses against closed forms, and all of them at extreme values. Values of other implementations: test_vectors.py."""

import dataclasses
import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from align.objectives import dpo, reference_free, tdpo
from align.objectives.f_divergences import F_DIVERGENCES, alpha_divergence, f_divergence, forward_kl, js_divergence
from align.objectives.preference import LOSSES
from align.objectives.preference_objective import preference_objective
from tests.objectives.pair_cases import pair_of, random_pairs


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_the_values(name):
    pairs = random_pairs(3)
    leaves = [pairs.chosen, pairs.rejected, pairs.chosen_kl, pairs.rejected_kl]
    if name == "tdpo2":  # its gradient is not that of its value, on purpose: the chosen KL is held
        pairs.chosen_kl = pairs.chosen_kl.detach()
        del leaves[2]
    objective = preference_objective(name)

    def losses(chosen, rejected, *kls):
        kls = (pairs.chosen_kl, *kls) if len(kls) == 1 else kls
        moved = dataclasses.replace(
            pairs, chosen=chosen, rejected=rejected, chosen_kl=kls[0], rejected_kl=kls[1], chosen_nll=-chosen
        )
        return objective(moved).losses

    assert losses(*leaves).shape == (3,)
    assert torch.autograd.gradcheck(losses, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("delta", [-1e4, -300.0, 0.0, 300.0, 1e4])
@pytest.mark.parametrize("name", LOSSES)
def test_extreme_values_are_finite(name, delta, dtype):
    extreme_is_finite(preference_objective(name), pair_of(delta, dtype))


@pytest.mark.parametrize("delta", [-1e4, -300.0, 0.0, 300.0, 1e4])
@pytest.mark.parametrize("divergence", F_DIVERGENCES)
@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if "f_divergence_type" in loss.modifiers])
def test_extreme_values_are_finite_with_f_divergences(name, delta, divergence):
    pairs = pair_of(delta)
    pairs.divergence = f_divergence(divergence)
    extreme_is_finite(preference_objective(name, None, {"f_divergence_type": divergence}), pairs)


def extreme_is_finite(objective, pairs):
    loss = objective(pairs).losses
    loss.sum().backward()
    assert loss.isfinite().all()
    assert all(t.grad is None or t.grad.isfinite().all() for t in (pairs.chosen, pairs.rejected, pairs.rejected_kl))


NOT_LOWER = ("sft", "apo_down", "discopop")
"""sft has no rejected side; apo_down starts flat in the chosen one; discopop has a bump at z = 0 (its tau is small)."""


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in NOT_LOWER])
def test_a_better_policy_has_a_smaller_loss(name):
    """Moving log-prob from rejected to chosen, from policy = reference, lowers the loss."""
    pairs = pair_of(0.0, torch.float64)
    pairs.chosen.data -= 1
    pairs.rejected.data -= 1
    pairs.ref_chosen, pairs.ref_rejected = pairs.chosen.detach(), pairs.rejected.detach()
    preference_objective(name)(pairs).losses.sum().backward()
    assert pairs.chosen.grad < 0 < pairs.rejected.grad


def test_discopop_has_a_bump_where_training_starts():
    """As published: d/dz at 0 is (1 - log 2)/(4 tau) - (1/2 + 1)/2 > 0, so that z falls first."""
    z = torch.zeros(1, dtype=torch.float64)
    pairs = pair_of(0.0, torch.float64)
    dpo.discopop(pairs, beta=1.0, discopop_tau=0.05).sum().backward()
    close(pairs.chosen.grad, z + (1 - math.log(2)) / (4 * 0.05) - 0.75)


def test_cdpo_is_smallest_at_the_log_odds_of_its_labels():
    z = torch.tensor([math.log(0.8 / 0.2)], dtype=torch.float64, requires_grad=True)
    dpo.smoothed(z, 0.2).sum().backward()
    close(z.grad, torch.zeros(1, dtype=torch.float64))
    pairs = random_pairs()
    close(dpo.cdpo(pairs, beta=0.3, label_smoothing=0.0), dpo.sigmoid(pairs, beta=0.3))


def test_robust_averages_to_the_clean_loss():
    """The expectation over labels that are flipped with probability e is DPO's loss on the true ones."""
    pairs = random_pairs()
    flipped = dataclasses.replace(
        pairs,
        chosen=pairs.rejected,
        rejected=pairs.chosen,
        ref_chosen=pairs.ref_rejected,
        ref_rejected=pairs.ref_chosen,
    )
    kept, changed = (dpo.robust(p, beta=0.2, label_smoothing=0.3) for p in (pairs, flipped))
    close(0.7 * kept + 0.3 * changed, dpo.sigmoid(pairs, beta=0.2))


def test_exo_is_the_divergence_from_the_smoothed_label():
    pairs = random_pairs()
    z = 0.4 * pairs.delta
    ours = torch.stack([logsigmoid(z), logsigmoid(-z)], -1)
    label = torch.tensor([0.9, 0.1], dtype=torch.float64).log()
    close(dpo.exo_pair(pairs, beta=0.4, label_smoothing=0.1), (ours.exp() * (ours - label)).sum(-1))


def test_rpo_adds_the_likelihood_in_two_normalisations():
    pairs = random_pairs()
    preference = -logsigmoid(0.2 * (pairs.chosen - pairs.ref_chosen - pairs.rejected + pairs.ref_rejected))
    close(dpo.rpo_sum(pairs, beta=0.2, rpo_eta=0.03), preference - 0.03 * 0.2 * pairs.chosen)
    close(dpo.rpo_mean(pairs, beta=0.2, rpo_coef=0.03), preference - 0.03 * pairs.chosen / pairs.chosen_length)


def test_sft_is_the_mean_over_tokens_whatever_the_micro_batches():
    pairs = random_pairs(6)
    expected = -pairs.chosen.sum() / pairs.chosen_length.sum()
    close(dpo.sft(pairs).mean(), expected)
    mean_length = pairs.chosen_length.double().mean()
    total = 0
    for part in (slice(0, 2), slice(2, 6)):
        fields = {f.name: getattr(pairs, f.name) for f in dataclasses.fields(pairs)}
        micro = type(pairs)(**{name: None if v is None else v[part] for name, v in fields.items()})
        micro.mean_chosen_length = mean_length
        total += dpo.sft(micro).sum()
    close(total / 6, expected)


def test_aot_does_not_look_at_which_reference_belongs_to_which_pair():
    pairs = random_pairs()
    order = torch.tensor([3, 0, 4, 1, 2])
    shuffled = dataclasses.replace(pairs, ref_chosen=pairs.ref_chosen[order], ref_rejected=pairs.ref_rejected[order])
    close(dpo.aot(shuffled), dpo.aot(pairs))
    assert not torch.allclose(dpo.sigmoid(shuffled).mean(), dpo.sigmoid(pairs).mean())
    mixed = dataclasses.replace(pairs, rejected=pairs.rejected[order], ref_rejected=pairs.ref_rejected[order])
    close(dpo.aot_unpaired(mixed), dpo.aot_unpaired(pairs))


def test_ipo_has_its_minimum_at_its_target():
    assert dpo.ipo_sum(pair_of(5.0), beta=0.1).item() == 0
    assert dpo.ipo(pair_of(50.0), beta=0.1).item() == 0  # ten tokens each
    assert dpo.sigmoid_norm(pair_of(50.0), beta=0.2).item() == pytest.approx(math.log(1 + math.exp(-1)))


def test_orpo_against_probabilities():
    pairs = random_pairs()
    p_w = (pairs.chosen / pairs.chosen_length).exp()
    p_l = (pairs.rejected / pairs.rejected_length).exp()
    ratio = torch.log((p_w / (1 - p_w)) / (p_l / (1 - p_l)))
    close(reference_free.orpo(pairs, beta=0.3), -p_w.log() - 0.3 * torch.log(torch.sigmoid(ratio)))


def test_cpo_is_dpo_without_reference_and_the_likelihood_per_token():
    pairs = random_pairs()
    z = 0.3 * (pairs.chosen - pairs.rejected)
    losses = reference_free.cpo(pairs, beta=0.3, cpo_alpha=0.7, label_smoothing=0.2)
    close(losses.mean(), dpo.smoothed(z, 0.2).mean() - 0.7 * pairs.chosen.sum() / pairs.chosen_length.sum())


def test_log1mexp_is_exact_near_zero_and_far_from_it():
    points = [-1e-12, -1e-3, -0.5, -math.log(2), -1.0, -20.0, -50.0, -800.0]
    x = torch.tensor(points, dtype=torch.float64, requires_grad=True)
    values = reference_free.log1mexp(x)
    expected = [
        math.log(1e-12),
        *(math.log(-math.expm1(v)) for v in points[1:5]),
        -math.exp(-20) - math.exp(-40) / 2,
    ]
    expected += [-math.exp(-50), 0.0]
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64), rtol=1e-11, atol=0)
    values.sum().backward()
    torch.testing.assert_close(x.grad, -1 / torch.expm1(-x.detach()), rtol=1e-11, atol=0)
    certain = torch.zeros(1, requires_grad=True)  # a completion that the model is sure of
    reference_free.log_odds(certain).backward()
    assert certain.grad.isfinite()


def test_alphapo_tends_to_simpo():
    pairs = random_pairs()
    simpo = reference_free.simpo(pairs, beta=3.0, simpo_gamma=0.7)
    close(reference_free.alphapo(pairs, beta=3.0, simpo_gamma=0.7, alphapo_alpha=0.0), simpo)
    nearly = reference_free.alphapo(pairs, beta=3.0, simpo_gamma=0.7, alphapo_alpha=1e-7)
    torch.testing.assert_close(nearly, simpo, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(reference_free.alphapo(pairs, beta=3.0, simpo_gamma=0.7, alphapo_alpha=0.5), simpo)


def test_tdpo_moves_the_kls_apart():
    pairs = random_pairs()
    tdpo.tdpo1(pairs).sum().backward()
    assert (pairs.chosen_kl.grad < 0).all() and (pairs.rejected_kl.grad > 0).all()
    held = random_pairs()
    tdpo.tdpo2(held, tdpo_alpha=0.5).sum().backward()
    assert held.chosen_kl.grad is None and (held.rejected_kl.grad > 0).all()
    zeros = torch.zeros_like(held.chosen_kl)
    without = dataclasses.replace(held, chosen_kl=zeros, rejected_kl=zeros)
    close(tdpo.tdpo1(without), dpo.sigmoid(held))
    close(tdpo.tdpo2(held, tdpo_alpha=0.0), dpo.sigmoid(held))


@pytest.mark.parametrize(
    ("score", "divergence"),
    [
        (forward_kl, lambda t: t - torch.log(t)),
        (js_divergence, lambda t: t * torch.log(t) - (1 + t) * torch.log((1 + t) / 2)),
        (lambda rho: alpha_divergence(rho, alpha=0.3), lambda t: (t**0.3 - 0.3 * t) / (0.3 * -0.7)),
        (lambda rho: alpha_divergence(rho, alpha=1.0), lambda t: t * torch.log(t) - t),
    ],
)
def test_scores_are_derivatives_of_the_divergences(score, divergence):
    """f'(t) by autograd of f, up to the constant that Delta does not see."""
    rho = torch.linspace(-3, 3, 13, dtype=torch.float64)
    t = rho.exp().requires_grad_()
    (derivative,) = torch.autograd.grad(divergence(t).sum(), t)
    close(score(rho) - score(rho[:1]), derivative - derivative[:1])


def test_alpha_divergence_in_float64_and_its_limits():
    """TRL's raises KeyError in float64."""
    rho = torch.linspace(-3, 3, 13, dtype=torch.float64)
    close(alpha_divergence(rho, alpha=0.0), forward_kl(rho))
    torch.testing.assert_close(alpha_divergence(rho, alpha=1 + 1e-9), rho, rtol=0, atol=1e-6)
