"""PPO's losses: invariants of the first update, gradients, aggregation over micro-batches, rollout correction."""

from functools import partial
from typing import get_args

import pytest
import torch

from align.errors import ConfigError, TrainingError
from align.objectives.groups import Scale, best_only, centred, group_relative, leave_one_out
from align.objectives.policy_loss import (
    AGGREGATIONS,
    PolicyLoss,
    aggregate_tokens,
    cispo_policy_loss,
    clipped_policy_loss,
    sapo_policy_loss,
    value_losses,
    vespo_policy_loss,
)
from align.objectives.rollout_correction import importance_weights, log_ratios, mismatch

MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("level", ["token", "sequence", "sequence_mean"])
def test_at_the_first_update_the_ratio_is_1_and_the_gradient_is_the_policy_gradient(level):
    old, advantages = draw(3, 4), draw(3, 4, seed=1)
    if level != "token":
        advantages = advantages[:, :1].expand(3, 4)
    new = old.clone().requires_grad_()
    result = clipped_policy_loss(new, old, advantages, MASK, ratio_level=level)
    assert torch.equal(result.ratio, torch.ones_like(old)) and not result.clipped.any()
    assert aggregate_tokens(result.losses, MASK, "token_mean").item() == pytest.approx(
        -(advantages * MASK).sum().item() / 9
    )
    result.losses.sum().backward()
    expected = -advantages * MASK
    if level == "sequence":  # every token's loss carries the whole sequence's ratio
        expected = expected * MASK.sum(-1, keepdim=True)
    assert torch.allclose(new.grad, expected)


def test_the_clip_stops_the_gradient_only_where_it_bounds():
    old = torch.zeros(1, 4, dtype=torch.float64)
    new = torch.tensor([[0.5, -0.5, 0.5, -0.5]], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0]], dtype=torch.float64)
    result = clipped_policy_loss(new, old, advantages, torch.ones(1, 4))
    result.losses.sum().backward()
    assert result.clipped.tolist() == [[True, False, False, True]]
    assert (new.grad[0] == 0).tolist() == [True, False, False, True]
    assert result.losses[0].tolist() == pytest.approx([-1.2, -(2.718281828**-0.5), 2.718281828**0.5, 0.8])


def test_dual_clip_caps_what_a_bad_action_can_cost():
    old, advantages = torch.zeros(1, 2), torch.tensor([[-1.0, 1.0]])
    new = torch.tensor([[2.0, 2.0]], requires_grad=True)
    result = clipped_policy_loss(new, old, advantages, torch.ones(1, 2), dual_clip=3.0)
    assert result.losses.tolist() == [[3.0, pytest.approx(-1.2)]] and result.dual_clipped.tolist() == [[True, False]]
    with pytest.raises(ConfigError, match="above 1"):
        clipped_policy_loss(new, old, advantages, torch.ones(1, 2), dual_clip=1.0)


def test_values_outside_the_mask_do_not_matter():
    old, new, advantages = draw(3, 4), draw(3, 4, seed=1), draw(3, 4, seed=2)
    reference = clipped_policy_loss(new, old, advantages, MASK)
    broken = new.masked_fill(MASK == 0, float("nan")).requires_grad_()
    result = clipped_policy_loss(broken, old, advantages, MASK)
    assert torch.equal(result.losses, reference.losses) and result.approx_kl == reference.approx_kl
    result.losses.sum().backward()
    assert broken.grad.isfinite().all()


@pytest.mark.parametrize(
    "loss",
    [
        *(partial(clipped_policy_loss, ratio_level=level) for level in ("token", "sequence", "sequence_mean")),
        partial(cispo_policy_loss, high=5.0),
        sapo_policy_loss,
        vespo_policy_loss,
        lambda *given: PolicyLoss(value_losses(*given)[0], *[None] * 4),
    ],
)
def test_nothing_outside_the_mask_makes_the_gradient_nan(loss):
    given = [draw(3, 4, seed=seed).masked_fill(MASK == 0, float("nan")) for seed in range(3)]
    clean = [values.nan_to_num(0.0) for values in given]
    given[0].requires_grad_(), clean[0].requires_grad_()
    loss(*given, MASK).losses.sum().backward(), loss(*clean, MASK).losses.sum().backward()
    assert torch.equal(given[0].grad, clean[0].grad)


@pytest.mark.parametrize("how", AGGREGATIONS)
def test_micro_batches_add_up(how):
    losses = draw(3, 4)
    normalizer = {"token_mean": MASK.sum(), "constant": 12}.get(how, 3)
    whole = aggregate_tokens(losses, MASK, how, normalizer)
    parts = sum(aggregate_tokens(losses[i : i + 1], MASK[i : i + 1], how, normalizer) for i in range(3))
    assert parts.item() == pytest.approx(whole.item())
    if how == "constant":
        with pytest.raises(ConfigError, match="needs its constant"):
            aggregate_tokens(losses, MASK, how)
    else:
        assert aggregate_tokens(losses, MASK, how).item() == pytest.approx(whole.item())


def test_value_loss():
    values, old, returns = draw(3, 4), draw(3, 4, seed=1), draw(3, 4, seed=2)
    plain, clipped = value_losses(values, old, returns, MASK, clip=None)
    assert torch.allclose(plain, (values - returns) ** 2 / 2 * MASK) and not clipped.any()
    bounded, clipped = value_losses(values, old, returns, MASK, clip=0.1)
    assert (bounded >= plain).all() and clipped.any()
    values = values.requires_grad_()
    value_losses(values, old, returns, MASK, clip=0.1)[0].sum().backward()
    near = (values - old).abs() < 0.1  # inside the clip the gradient is the plain one
    assert torch.allclose(values.grad[near], ((values - returns) * MASK)[near])


def test_group_advantages():
    scores = draw(4, 3)
    for advantages in (leave_one_out(scores), group_relative(scores, scale="none"), group_relative(scores)):
        assert torch.allclose(advantages.sum(-1), torch.zeros(4, dtype=torch.float64), atol=1e-12)
    others = torch.stack([scores[:, [j for j in range(3) if j != i]].mean(-1) for i in range(3)], dim=-1)
    assert torch.allclose(leave_one_out(scores), scores - others)
    level = torch.ones(2, 3)
    assert not group_relative(level).any() and not leave_one_out(level).any()
    tied = best_only(torch.tensor([[1.0, 1.0, 0.0], [3.0, 1.0, 0.0]]))
    assert not tied[0].any() and tied[1, 0] > 0 and not tied[1, 1:].any()
    with pytest.raises(ConfigError, match="group, batch or none"):
        group_relative(scores, scale="std")
    with pytest.raises(TrainingError, match="num_generations"):
        leave_one_out(scores[:, :1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n", [2, 3, 7, 8, 33])
def test_groups_of_any_size_scale_and_dtype(dtype, n):
    """Equal scores are exactly 0; what differs is centred as in float64 of the same scores, large means included."""
    functions = [centred, leave_one_out, best_only, *(partial(group_relative, scale=s) for s in get_args(Scale))]
    for value in (0.1, 1 / 3, -4e4, 1e6 + 0.1, 3e38):
        equal = torch.full((2, n), value).to(dtype)
        other = equal.clone()
        other[0, -1] += 1 if dtype in (torch.float64, torch.float32) else value / 64
        for function in functions if equal.isfinite().all() and other.isfinite().all() else ():
            assert not function(equal).any()
            found, wanted = function(other), function(other.double())
            assert found.dtype == torch.promote_types(dtype, torch.float32)
            torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-7)


def test_samples_that_do_not_count_are_as_if_they_were_not_there():
    scores = draw(4, 5)
    kept = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 1, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]]).bool()
    for function in (leave_one_out, partial(group_relative, scale="none"), group_relative):
        found = function(scores, kept=kept)
        for row in (0, 1):
            assert torch.allclose(found[row, kept[row]], function(scores[row : row + 1, kept[row]])[0])
        assert not found[~kept].any() and not found[2:].any()  # an only one has nothing to be compared with
    differences = group_relative(scores, scale="none", kept=kept)
    assert torch.allclose(group_relative(scores, scale="batch", kept=kept), differences / (scores[kept].std() + 1e-4))
    level = torch.tensor([[0.1, 0.3, 0.1, 0.1, -9.0]])
    assert not group_relative(level, kept=torch.tensor([[1, 0, 1, 1, 0]]).bool()).any()


def test_correction_of_an_engine_that_agrees_changes_nothing():
    zero = torch.zeros(3, 4, dtype=torch.float64)
    for level in ("token", "sequence", "sequence_mean"):
        for outside in ("truncate", "mask"):
            weights = importance_weights(zero, MASK, level=level, high=2.0, low=0.5, outside=outside, normalize=True)
            assert torch.equal(weights, MASK.double())
    numbers = mismatch(zero, MASK)
    assert numbers["kl"] == 0 and numbers["effective_sample_size"] == pytest.approx(1)


def test_how_far_the_engine_is_by_hand():
    ratios = torch.tensor([[1.0, 2.0, 50.0], [0.5, 1.0, 0.5]], dtype=torch.float64)
    found = mismatch(ratios.log(), torch.tensor([[1, 1, 0], [1, 1, 1]]))  # the 50 does not count
    assert (found["ratio_mean"], found["ratio_max"]) == pytest.approx((1.0, 2.0))
    assert found["chi2_token"] == pytest.approx((1 + 4 + 0.25 + 1 + 0.25) / 5 - 1)
    assert found["chi2_sequence"] == pytest.approx((2.0**2 + 0.25**2) / 2 - 1)
    assert found["effective_sample_size"] == pytest.approx(1.0**2 / 1.3)  # mean squared over the mean of squares


def test_importance_weights_make_the_engines_mean_the_trainers():
    """Over a vocabulary of 5: sum_y engine(y) * w(y) * f(y) = sum_y trainer(y) * f(y), with bounds that do not bite."""
    trainer, engine, f = draw(5).log_softmax(-1), draw(5, seed=1).log_softmax(-1), draw(5, seed=2)
    mask = torch.ones(5, 1)
    weights = importance_weights(log_ratios(trainer[:, None], engine[:, None], mask), mask, high=1e6)[:, 0]
    assert (engine.exp() * weights * f).sum().item() == pytest.approx((trainer.exp() * f).sum().item())


def test_correction_options_that_make_no_sense_are_refused():
    zero = torch.zeros(3, 4)
    for options in ({"high": 1.0, "low": 2.0}, {"high": 2.0, "level": "batch"}, {"high": 2.0, "outside": "drop"}):
        with pytest.raises(ConfigError, match="rollout correction"):
            importance_weights(zero, MASK, **options)
