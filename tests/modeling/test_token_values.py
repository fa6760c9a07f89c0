"""Log-prob, entropy and KL by tiles and by chunks against the dense formulas, gradients included."""

import pytest
import torch
from torch import nn

from align.errors import ConfigError
from align.modeling import vocabulary_tiles
from align.modeling.heads import Head, LogitTransform, head_of
from align.modeling.token_values import token_values

N, D, V = 11, 6, 37
TRANSFORMS = {
    "plain": LogitTransform(),
    "scaled": LogitTransform(scale=0.4, temperature=0.7),
    "capped": LogitTransform(scale=1.3, cap=2.0, temperature=1.5),
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(vocabulary_tiles, "CACHE_TILE", 25)  # tiles of 6 logits, the last one of 1
    monkeypatch.setattr(vocabulary_tiles, "BLOCK", 4)


def draw(seed=0, bias=True, dtype=torch.float64):
    torch.manual_seed(seed)
    layer = nn.Linear(D, V, bias=bias, dtype=dtype)
    nn.init.normal_(layer.weight)
    return layer, torch.randn(N, D, dtype=dtype, requires_grad=True)


def dense(layer, hidden, targets, transform, ref_logits):
    log_p = transform(layer(hidden)).log_softmax(-1)
    log_q = ref_logits.log_softmax(-1)
    kl = torch.zeros(len(hidden), dtype=log_p.dtype)
    for i, row in enumerate(log_q.exp()):
        for v, q in enumerate(row):
            if q > 0:
                kl[i] = kl[i] + q * (log_q[i, v] - log_p[i, v])
    entropy = -(log_p.exp() * log_p).nan_to_num(0.0).sum(-1)
    logps, ref_logps = (x.gather(-1, targets[:, None])[:, 0] for x in (log_p, log_q))
    return logps, kl, entropy, (log_p.exp() ** 2).sum(-1).log(), ref_logps


def gradients(values, layer, hidden, weights):
    for tensor in (hidden, *layer.parameters()):
        tensor.grad = None
    sum((w * v).sum() for w, v in zip(weights, values[:2], strict=True) if w is not None).backward()
    return [hidden.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.parametrize("with_kl", [True, False], ids=["kl", "log-prob"])
@pytest.mark.parametrize("linear", [True, False], ids=["tiles", "chunks"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_values_and_gradients(name, linear, with_kl):
    transform = TRANSFORMS[name]
    (layer, hidden), (ref_layer, ref_hidden) = draw(), draw(seed=1, bias=False)
    ref_hidden = ref_hidden.detach()[:, :4]
    ref_layer = nn.Linear(4, V, bias=False, dtype=torch.float64)
    targets = torch.randint(0, V, (N,))
    weights = [torch.randn(N, dtype=torch.float64), torch.randn(N, dtype=torch.float64) if with_kl else None]
    heads = [head_of(layer, V, transform), head_of(ref_layer, V, TRANSFORMS["capped"])]
    if not linear:
        heads = [h._replace(weight=None, bias=None) for h in heads]
    expected = dense(layer, hidden, targets, transform, TRANSFORMS["capped"](ref_layer(ref_hidden)).detach())
    reference = (heads[1], ref_hidden) if with_kl else None
    options = {"entropy": True, "sum_squares": True, "chunk_size": 4}
    actual = token_values(heads[0], hidden, targets, reference=reference, **options)
    for ours, theirs in zip(actual, expected, strict=True):
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert (actual.kl is None) == (actual.ref_logps is None) == (not with_kl)
    assert not actual.entropy.requires_grad and not actual.log_sum_squares.requires_grad
    for ours, theirs in zip(
        gradients(actual, layer, hidden, weights), gradients(expected, layer, hidden, weights), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize("linear", [True, False], ids=["tiles", "chunks"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_entropy_has_a_gradient_where_it_is_asked_for(name, linear):
    """Beside that of the log-prob and alone, with logits of -inf (a padded vocabulary)."""
    layer, hidden = draw()
    with torch.no_grad():
        layer.bias[30:] = -torch.inf if TRANSFORMS[name].cap is None else 0.0
    targets, transform = torch.randint(0, 20, (N,)), TRANSFORMS[name]
    head = head_of(layer, V, transform)
    if not linear:
        head = head._replace(weight=None, bias=None)
    weights = torch.randn(2, N, dtype=torch.float64)

    def grads(logps, entropy, both):
        for tensor in (hidden, *layer.parameters()):
            tensor.grad = None
        ((weights[0] * logps).sum() * both + (weights[1] * entropy).sum()).backward()
        return [hidden.grad, *(p.grad for p in layer.parameters())]

    log_p = transform(layer(hidden)).log_softmax(-1)
    entropy = -torch.where(log_p > -torch.inf, log_p.exp() * log_p.clamp(min=-1e6), 0.0).sum(-1)
    logps = log_p.gather(-1, targets[:, None])[:, 0]
    for both in (1, 0):
        found = token_values(head, hidden, targets, entropy=True, entropy_gradient=True, chunk_size=4)
        torch.testing.assert_close(found.entropy, entropy, rtol=0, atol=1e-12)
        ours, theirs = grads(found.logps, found.entropy, both), grads(logps, entropy, both)
        log_p = transform(layer(hidden)).log_softmax(-1)  # the graph is used up
        entropy = -torch.where(log_p > -torch.inf, log_p.exp() * log_p.clamp(min=-1e6), 0.0).sum(-1)
        logps = log_p.gather(-1, targets[:, None])[:, 0]
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("linear", [True, False], ids=["tiles", "chunks"])
def test_padded_vocabulary_adds_nothing(linear):
    """Logits of -inf on both sides, on the reference's alone, and probabilities that underflow: finite values."""
    (layer, hidden), (ref_layer, ref_hidden) = draw(), draw(seed=1)
    with torch.no_grad():
        layer.bias[30:] = -torch.inf
        ref_layer.bias[28:] = -torch.inf
        ref_layer.bias[20] = -2000.0
    targets, weights = torch.randint(0, 20, (N,)), [torch.ones(N, dtype=torch.float64)] * 2
    heads = [head_of(layer, V, LogitTransform()), head_of(ref_layer, V, LogitTransform())]
    if not linear:
        heads = [h._replace(weight=None, bias=None) for h in heads]
    actual = token_values(heads[0], hidden, targets, reference=(heads[1], ref_hidden.detach()), chunk_size=4)
    expected = dense(layer, hidden, targets, LogitTransform(), ref_layer(ref_hidden).detach())
    torch.testing.assert_close(actual.kl, expected[1], rtol=0, atol=1e-12)
    assert actual.kl.min() > 0 and actual.logps.isfinite().all()
    ours, theirs = (gradients(values, layer, hidden, weights) for values in (actual, expected))
    assert all(g.isfinite().all() for g in ours)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_policy_equal_to_its_reference_has_no_kl():
    layer, hidden = draw(dtype=torch.float32)
    head = head_of(layer, V, LogitTransform())
    values = token_values(head, hidden, torch.zeros(N, dtype=torch.long), reference=(head, hidden))
    assert values.kl.eq(0).all() and torch.equal(values.logps, values.ref_logps)


def test_only_what_needs_a_gradient_gets_one():
    layer, hidden = draw()
    layer.requires_grad_(False)
    values = token_values(head_of(layer, V, LogitTransform()), hidden, torch.zeros(N, dtype=torch.long))
    values.logps.sum().backward()
    assert hidden.grad is not None and layer.weight.grad is None
    layer.requires_grad_(True)
    token_values(
        head_of(layer, V, LogitTransform()), hidden.detach(), torch.zeros(N, dtype=torch.long)
    ).logps.sum().backward()
    assert layer.weight.grad is not None


def test_half_precision():
    """Weights in bfloat16, or autocast: sums in float32, within the rounding of the products."""
    layer, hidden = draw(dtype=torch.float32)
    targets = torch.randint(0, V, (N,))
    exact = token_values(head_of(layer, V, LogitTransform()), hidden, targets).logps
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = token_values(head_of(layer, V, LogitTransform()), hidden, targets).logps
    mixed.sum().backward()
    assert mixed.dtype == torch.float32 and layer.weight.grad.dtype == hidden.grad.dtype == torch.float32
    half_layer, half_hidden = layer.bfloat16(), hidden.detach().bfloat16().requires_grad_()
    half = token_values(head_of(half_layer, V, LogitTransform()), half_hidden, targets).logps
    half.sum().backward()
    assert half.dtype == torch.float32 and half_hidden.grad.dtype == torch.bfloat16
    for logps in (mixed, half):
        torch.testing.assert_close(logps, exact, rtol=0, atol=0.1)


def test_heads_that_do_more_are_called():
    layer, _ = draw()
    assert head_of(layer, V, LogitTransform()).weight is layer.weight
    layer.register_forward_hook(lambda *a: None)
    assert head_of(layer, V, LogitTransform()).weight is None
    assert head_of(nn.Sequential(layer), V, LogitTransform()).weight is None


def test_two_vocabularies_are_refused():
    layer, hidden = draw()
    head = head_of(layer, V, LogitTransform())
    with pytest.raises(ConfigError, match="37 logits and the reference 40"):
        token_values(head, hidden, torch.zeros(N, dtype=torch.long), reference=(Head(layer, 40), hidden))


def test_no_token():
    """As for a micro-batch that only evens out the number of calls of the processes."""
    layer, hidden = draw()
    values = token_values(head_of(layer, V, LogitTransform()), hidden[:0], torch.zeros(0, dtype=torch.long))
    values.logps.sum().backward()
    assert values.logps.shape == (0,) and layer.weight.grad.eq(0).all()
