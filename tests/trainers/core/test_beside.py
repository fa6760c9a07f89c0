"""Steps of what is trained beside the policy."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from align.modeling.load import load_policy
from align.trainers.core import beside
from align.trainers.on_policy.critic import share_of_start
from tests.trainers.tiny_runs import on_policy, prompts, wanted_words


def test_biases_and_norms_beside_the_policy_do_not_decay(policy, tmp_path):
    """As in the policy's optimiser: in the critic's all did."""
    kind, args = on_policy("ppo", tmp_path, weight_decay=0.1)
    trainer = kind(policy, wanted_words, args, prompts(32))
    names = {p: name.removeprefix("backbone.") for name, p in trainer.critic.model.named_parameters()}
    groups = trainer.critic.optimizer.param_groups
    decayed = {names[p] for group in groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {*trainer.get_decay_parameter_names(trainer.model.model), "head.weight"} != {*names.values()}
    trainer.close()
    groups = beside.groups(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), 0.1)
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(1, 0.1), (3, 0.0)]


def plain_step(scaler, dtype, size):
    """The gradients of a small network whose loss is divided by `size`, its weights after a step, and the norm."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer, seen = torch.optim.SGD(model.parameters(), lr=1.0), {}
    optimizer.register_step_pre_hook(lambda *_: seen.update({n: p.grad.clone() for n, p in model.named_parameters()}))
    accelerator = SimpleNamespace(scaler=scaler)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        loss = model(torch.linspace(-1, 1, 32).view(4, 8)).float().square().sum() / size
    beside.backward(loss, accelerator)
    norm = beside.step(model.parameters(), optimizer, accelerator, 0.0)
    assert all(p.grad is None for p in model.parameters())
    return seen, [p.detach().clone() for p in model.parameters()], norm


def test_gradients_in_float16_are_scaled():
    """Of a million tokens they are below what float16 holds, as those of the policy would be."""
    exact, _, norm = plain_step(None, None, 1e6)
    scaled, _, same_norm = plain_step(torch.amp.GradScaler("cpu"), torch.float16, 1e6)
    assert same_norm == pytest.approx(norm.item(), rel=2e-2)
    for name, gradient in exact.items():
        torch.testing.assert_close(scaled[name], gradient, rtol=5e-2, atol=1e-3 * gradient.abs().max().item())
    unscaled, _, _ = plain_step(None, torch.float16, 1e6)
    assert not torch.allclose(unscaled["0.weight"], exact["0.weight"], rtol=0.1, atol=0)


def test_a_scale_that_is_too_large_makes_no_step():
    taken, weights, norm = plain_step(torch.amp.GradScaler("cpu", init_scale=2.0**60), torch.float16, 1.0)
    _, moved, _ = plain_step(None, None, 1.0)
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    assert norm is None and not taken
    assert all(torch.equal(a, b) for a, b in zip(weights, start.parameters(), strict=True))
    assert not torch.equal(moved[0], weights[0])


@pytest.mark.parametrize("limit", [0.0, 0.5])
def test_a_limit_of_0_is_none(limit):
    weight = nn.Parameter(torch.zeros(2))
    optimizer, accelerator = torch.optim.SGD([weight], lr=1.0), SimpleNamespace(scaler=None)
    beside.backward((weight * torch.tensor([3.0, 4.0])).sum(), accelerator)
    assert beside.step([weight], optimizer, accelerator, limit).item() == 5
    assert weight.norm().item() == pytest.approx(limit or 5.0, rel=1e-5)


def test_the_critic_follows_the_schedule_of_a_users_optimizer(policy, tmp_path):
    """Which starts from a rate of its own, here a thousand times `learning_rate`."""
    trainer_class, args = on_policy(
        "ppo", tmp_path, max_steps=2, num_iterations=1, lr_scheduler_type="linear", learning_rate=1e-6
    )
    model, rates = load_policy(policy), []
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    trainer = trainer_class(model, wanted_words, args, prompts(16), optimizers=(optimizer, None))
    trainer.critic.optimizer.register_step_pre_hook(lambda own, *_: rates.append(own.param_groups[0]["lr"]))
    trainer.train()
    assert rates == pytest.approx([1e-5, 5e-6])
    plateau = torch.optim.SGD(model.parameters(), lr=1e-3)
    torch.optim.lr_scheduler.ReduceLROnPlateau(plateau, patience=0, factor=0.5).step(1.0)
    assert share_of_start(plateau) == 1.0
