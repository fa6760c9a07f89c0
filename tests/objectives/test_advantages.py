import pytest
import torch

from align.errors import ConfigError
from align.objectives.advantages import remax_token_weights
from align.objectives.policy_loss import aggregate_tokens
from align.objectives.returns import reward_to_go

REWARDS, GREEDY = torch.tensor([3.0, -9.0]), torch.tensor([1.0, 0.0])
LOGPS = torch.tensor([[-1.0, -2.0, -3.0], [-0.5, -0.5, -7.0]])
REF = torch.tensor([[-1.5, -2.0, -2.0], [-1.0, -0.5, float("nan")]])
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])


def weights(**options):
    return remax_token_weights(REWARDS, GREEDY, LOGPS, REF, MASK, **{"beta": 0.0, **options})


def test_by_hand():
    assert weights().tolist() == [[2, 2, 2], [-9, -9, 0]]
    assert weights(gamma=0.5).tolist() == [[0.25, 0.5, 1.0], [-2.25, -4.5, 0]]
    assert weights(reward_clip=5).tolist() == [[2, 2, 2], [-5, -5, 0]]
    assert weights(beta=1.0).tolist() == [[1.5, 2, 3], [-9.5, -9, 0]]
    assert weights(beta=1.0, kl_mode="to_go").tolist() == [[2.5, 3, 3], [-9.5, -9, 0]]
    assert remax_token_weights(REWARDS, GREEDY, LOGPS, None, MASK, beta=1.0, kl_mode="none")[0].tolist() == [2, 2, 2]


def test_left_padded_rows_discount_alike():
    left = remax_token_weights(
        REWARDS[1:], GREEDY[1:], LOGPS[1:], REF[1:].nan_to_num(), torch.tensor([[0, 1, 1]]), beta=0.0, gamma=0.5
    )
    assert left.tolist() == [[0, -2.25, -4.5]]


def test_detached_and_normalised():
    logps = LOGPS.clone().requires_grad_()
    w = remax_token_weights(REWARDS, GREEDY, logps, REF, MASK, beta=0.1)
    assert not w.requires_grad
    aggregate_tokens(-w * logps, MASK, "token_mean", 10).backward()
    assert torch.allclose(logps.grad, -w / 10)


def test_unknown_kl_mode():
    with pytest.raises(ConfigError, match="one_step, to_go or none"):
        weights(kl_mode="full")


def test_reward_to_go():
    assert reward_to_go(torch.tensor([[1.0, 2.0, float("nan")]]), torch.tensor([[1, 1, 0]])).tolist() == [[3, 2, 0]]


def test_unbiased_on_a_bandit():
    """Expected over all (sample, greedy) the ReMax gradient is the exact policy gradient of the expected reward."""
    torch.manual_seed(1)
    logits = torch.randn(6, dtype=torch.float64, requires_grad=True)
    reward = torch.randn(6, dtype=torch.float64)
    logp = logits.log_softmax(-1)
    (exact,) = torch.autograd.grad(-(logp.exp() * reward).sum(), logits, retain_graph=True)
    greedy = reward[logits.argmax()].expand(6)
    one = torch.ones(6, 1)
    w = remax_token_weights(reward, greedy, logp[:, None], None, one, beta=0.0, kl_mode="none")
    (estimate,) = torch.autograd.grad(
        aggregate_tokens(-w * (logp * logp.exp().detach())[:, None], one, "token_mean", 1), logits
    )
    assert torch.allclose(estimate, exact)
