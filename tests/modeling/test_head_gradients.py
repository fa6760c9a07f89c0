"""Gradients of the head in bfloat16 against float64, token by token: as good as those of one dense autocast pass."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from align.modeling import vocabulary_tiles
from align.modeling.heads import LogitTransform, head_of
from align.modeling.logprobs import token_logps
from align.modeling.token_values import token_values
from tests.modeling import tiny

N, D, V = 1024, 32, 512
TRANSFORMS = {
    "plain": LogitTransform(),
    "scaled": LogitTransform(scale=0.5, temperature=0.7),
    "capped": LogitTransform(cap=40.0),
}


@pytest.fixture(autouse=True)
def several_tiles(monkeypatch):
    monkeypatch.setattr(vocabulary_tiles, "CACHE_TILE", 64 * 200)
    monkeypatch.setattr(vocabulary_tiles, "BLOCK", 64)


def layer_of(weight, bias, dtype):
    layer = nn.Linear(D, V, dtype=dtype)
    layer.weight.data.copy_(weight)
    layer.bias.data.copy_(bias)
    return layer


def inputs():
    """Frequent and rare targets, which the hidden states predict with any confidence; all exact in bfloat16."""
    torch.manual_seed(0)
    weight, bias = torch.randn(V, D) / D**0.5, torch.randn(V) / 4
    targets = torch.multinomial(1 / torch.arange(1.0, V + 1), N, replacement=True)
    hidden = torch.randn(N, D) + (torch.rand(N, 1) * 22 + 2) * weight[targets]
    ref_weight = weight + 0.05 * torch.randn(V, D) / D**0.5
    return (t.bfloat16().float() if t.is_floating_point() else t for t in (weight, bias, targets, hidden, ref_weight))


def gradients(how, transform, with_kl):
    """Gradients of hidden [N, D], weight and bias in float64, and p of the targets where it is exact.

    how: exact, plain (all logits in autocast), autocast, half (bfloat16 weights), chunks (a head that is called).
    """
    weight, bias, targets, hidden, ref_weight = inputs()
    g, k = torch.randn(N) / 16, torch.randn(N) / 16
    dtype = {"exact": torch.float64, "half": torch.bfloat16}.get(how, torch.float32)
    layer, ref_layer = layer_of(weight, bias, dtype), layer_of(ref_weight, bias, dtype)
    hidden = hidden.to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how in ("plain", "autocast", "chunks")):
        if how in ("exact", "plain"):
            wide = torch.float64 if how == "exact" else torch.float32
            log_p = transform(layer(hidden).to(wide)).log_softmax(-1)
            log_q = transform(ref_layer(hidden).to(wide)).log_softmax(-1).detach()
            logps, kl = log_p.gather(-1, targets[:, None])[:, 0], (log_q.exp() * (log_q - log_p)).sum(-1)
        else:
            heads = [head_of(each, V, transform) for each in (layer, ref_layer)]
            if how == "chunks":
                heads = [head._replace(weight=None, bias=None) for head in heads]
            reference = (heads[1], hidden.detach()) if with_kl else None
            values = token_values(heads[0], hidden, targets, reference=reference, chunk_size=8)
            logps, kl = values.logps, values.kl
    ((logps * g).sum() + ((kl * k).sum() if with_kl else 0)).backward()
    return hidden.grad.double(), layer.weight.grad.double(), layer.bias.grad.double(), logps.detach().exp()


def errors(actual, exact):
    return (actual - exact).norm(dim=-1) / exact.norm(dim=-1)


@pytest.mark.parametrize("with_kl", [False, True], ids=["log-prob", "kl"])
@pytest.mark.parametrize("how", ["autocast", "half", "chunks"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_as_exact_as_one_dense_autocast_pass(name, how, with_kl):
    # errors are mostly those of the rounded logits, drawn for each way: medians of so few tokens vary by a fifth
    exact, plain, ours = (gradients(h, TRANSFORMS[name], with_kl) for h in ("exact", "plain", how))
    p = exact[3]
    for low, high in ((0, 0.5), (0.5, 0.9), (0.9, 0.99), (0.99, 0.999)):
        some = (p >= low) & (p < high)
        assert some.sum() > 10, (low, int(some.sum()))
        of_ours, of_plain = (errors(found[0], exact[0])[some].median() for found in (ours, plain))
        assert of_ours <= 1.25 * of_plain, (low, of_ours, of_plain)
    for what, a, b, truth in zip(("hidden", "weight", "bias"), ours, plain, exact[:3], strict=False):
        of_ours, of_plain = errors(a.flatten(), truth.flatten()), errors(b.flatten(), truth.flatten())
        # the gradients themselves are rounded where the weights are bfloat16
        assert of_ours <= 1.25 * of_plain + (0.002 if how == "half" else 0), (what, of_ours, of_plain)
        assert what == "bias" or of_ours <= 0.013, (what, of_ours)


def test_sums_over_blocks_are_not_rounded_between():
    """The same token 1024 times: as many equal terms, which bfloat16 stops to add at 256 of the smallest."""
    torch.manual_seed(0)
    layer = nn.Linear(D, V, bias=False)
    row, targets = torch.randn(1, D).bfloat16().float(), torch.full((N,), 3)
    found = {}
    for count in (1, N):
        layer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            head = head_of(layer, V, LogitTransform())
            values = token_values(head, row.expand(count, D), targets[:count], chunk_size=1)
        values.logps.sum().backward()
        found[count] = layer.weight.grad.clone()
    torch.testing.assert_close(found[N], N * found[1], rtol=1e-5, atol=0)


def test_gradients_are_the_same_every_time():
    first, second = (gradients("autocast", TRANSFORMS["capped"], True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_head_trained_in_full_beside_an_adapter_is_tiled():
    model = tiny.causal(dtype=torch.float32)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(model, config)
    head = model.get_base_model().get_output_embeddings()
    trained = head.modules_to_save["default"].weight
    assert head_of(head, tiny.VOCAB, LogitTransform()).weight is trained
    ids, mask = tiny.rows()
    before = token_logps(model, ids, mask)
    before.sum().backward()
    assert trained.grad.abs().sum() > 0
    with torch.no_grad():
        trained.mul_(0.5)
        assert not torch.allclose(before, token_logps(model, ids, mask))
    with model.disable_adapter():
        assert head_of(head, tiny.VOCAB, LogitTransform()).weight is head.original_module.weight
        torch.testing.assert_close(token_logps(model, ids, mask), before)
