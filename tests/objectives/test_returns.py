"""Returns, GAE and whitening against brute force and closed forms."""

import pytest
import torch

from align.errors import ConfigError, TrainingError
from align.objectives.returns import gae, last_token, reward_to_go, token_rewards, whiten

MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_score_is_on_the_last_token_and_the_kl_on_every_one():
    d = draw(2, 4)
    rewards = token_rewards(torch.tensor([3.0, -1.0], dtype=torch.float64), d, MASK, beta=0.5)
    assert rewards[0, 3].item() == pytest.approx(3 - 0.5 * d[0, 3].item())
    assert rewards[1].tolist() == pytest.approx([-0.5 * d[1, 0].item(), -1 - 0.5 * d[1, 1].item(), 0, 0])
    assert last_token(MASK).nonzero().tolist() == [[0, 3], [1, 1]]
    with pytest.raises(ConfigError, match="no log-ratios"):
        token_rewards(torch.ones(2), None, MASK, beta=0.1)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_reward_to_go_is_the_double_sum(gamma):
    rewards = draw(2, 4)
    rewards[1, 2:] = float("nan")  # what lies outside the mask must not matter
    returns = reward_to_go(rewards, MASK, gamma)
    for row, length in ((0, 4), (1, 2)):
        expected = [sum(gamma ** (s - t) * rewards[row, s].item() for s in range(t, length)) for t in range(length)]
        assert returns[row].tolist() == pytest.approx(expected + [0.0] * (4 - length))


def test_gae_is_the_sum_of_discounted_residuals():
    rewards, values, gamma, lam = draw(2, 4), draw(2, 4, seed=1), 0.97, 0.8
    advantages, returns = gae(rewards, values, MASK, gamma=gamma, lam=lam)
    for row, length in ((0, 4), (1, 2)):
        v = values[row, :length].tolist() + [0.0]
        delta = [rewards[row, t].item() + gamma * v[t + 1] - v[t] for t in range(length)]
        expected = [sum((gamma * lam) ** (s - t) * delta[s] for s in range(t, length)) for t in range(length)]
        assert advantages[row, :length].tolist() == pytest.approx(expected)
    assert torch.allclose(returns, (advantages + values) * MASK)


def test_gae_with_lambda_1_is_the_return_less_the_value():
    rewards, values = draw(2, 4), draw(2, 4, seed=1)
    advantages, returns = gae(rewards, values, MASK, gamma=1.0, lam=1.0)
    assert torch.allclose(returns, reward_to_go(rewards, MASK))
    assert torch.allclose(advantages, (reward_to_go(rewards, MASK) - values) * MASK)


def test_heads_are_computed_side_by_side():
    rewards, values = draw(2, 4, 3), draw(2, 4, 3, seed=1)
    together = gae(rewards, values, MASK)
    for head in range(3):
        alone = gae(rewards[..., head], values[..., head], MASK)
        assert torch.equal(together[0][..., head], alone[0]) and torch.equal(together[1][..., head], alone[1])
    with pytest.raises(TrainingError, match="must have one shape"):
        gae(rewards, values[..., 0], MASK)


def test_a_hole_is_passed_over():
    """A tool's output in the middle: the same numbers as without it."""
    rewards, values = draw(1, 3), draw(1, 3, seed=1)
    plain = gae(rewards, values, torch.ones(1, 3))[0][0]
    put = torch.tensor([0, 2, 3])
    spread_rewards, spread_values = torch.full((1, 4), 9.0).double(), torch.full((1, 4), 9.0).double()
    spread_rewards[0, put], spread_values[0, put] = rewards[0], values[0]
    holed = gae(spread_rewards, spread_values, torch.tensor([[1, 0, 1, 1]]))[0][0]
    assert torch.allclose(holed[put], plain) and holed[1] == 0
    gone = reward_to_go(spread_rewards, torch.tensor([[1, 0, 1, 1]]), 0.9)[0, put]
    assert torch.allclose(gone, reward_to_go(rewards, torch.ones(1, 3), 0.9)[0])


def test_whitened_values_have_mean_0_and_deviation_1():
    values = draw(2, 4) * 3 + 5
    white = whiten(values, MASK)[MASK.bool()]
    assert white.mean().item() == pytest.approx(0, abs=1e-7) and white.std().item() == pytest.approx(1, rel=1e-6)
    kept = whiten(values, MASK, shift_mean=False)[MASK.bool()]
    assert kept.mean().item() == pytest.approx(values[MASK.bool()].mean().item())
    equal = torch.full((2, 4), 0.3)  # whose mean in float32 is another number
    assert not whiten(equal, MASK).any()
    assert whiten(equal, MASK, shift_mean=False)[MASK.bool()].tolist() == pytest.approx([0.3] * 6)
    large = torch.tensor([[1e6 + 0.0625, 1e6 + 0.0625, 1e6 + 0.0625, 1e6]])  # whose mean float32 does not hold
    white = whiten(large, torch.ones(1, 4))
    torch.testing.assert_close(white.double(), whiten(large.double(), torch.ones(1, 4)), rtol=1e-5, atol=1e-5)
    with pytest.raises(TrainingError, match="1 tokens cannot be whitened"):
        whiten(values, torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0]]))
