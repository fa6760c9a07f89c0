import math

import torch

from align.objectives import kl


def enumerate_kl(logits, ref_logits):
    logp, ref = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    return logp, ref, (logp.exp() * (logp - ref)).sum()


def test_expected_values_and_gradients_on_a_categorical():
    """Exact expectations over all outcomes: k1 and k3 give KL; k2's loss gives its gradient and k1's gives none."""
    torch.manual_seed(0)
    logits = torch.randn(5, dtype=torch.float64, requires_grad=True)
    logp, ref, exact = enumerate_kl(logits, torch.randn(5, dtype=torch.float64))
    (true_gradient,) = torch.autograd.grad(exact, logits, retain_graph=True)
    forward_kl = (ref.exp() * (ref - logp)).sum()
    (forward_gradient,) = torch.autograd.grad(forward_kl, logits, retain_graph=True)
    weights = logp.exp().detach()
    gradients = {}
    for estimator in (kl.k1, kl.k2, kl.k3):
        value = (weights * estimator(logp, ref)).sum()
        (gradients[estimator.__name__],) = torch.autograd.grad(value, logits, retain_graph=True)
        assert (estimator.__name__ == "k2") != torch.allclose(value, exact)
    assert torch.allclose(gradients["k1"], torch.zeros(5, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(gradients["k2"], true_gradient)
    assert torch.allclose(gradients["k3"], forward_gradient)


def test_k3_is_precise_near_zero():
    d = torch.tensor([1e-4])
    assert math.isclose(kl.k3(d, torch.zeros(1)).item(), 5e-9, rel_tol=0.02)


def test_masked_sums_ignore_what_is_outside():
    values = torch.tensor([[1.0, 2.0, float("nan")], [3.0, float("inf"), 5.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 1]])
    assert kl.masked_sum(values, mask).tolist() == [3.0, 8.0]
    assert kl.masked_mean(values, mask).item() == 11 / 4
