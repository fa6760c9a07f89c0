"""What trainers compute on this device in bfloat16, against float32: shared rows, log-probs, gradients of the head."""

import pytest
import torch
from torch import nn

from align.data import PairCollator, SharedPrefixCollator
from align.modeling import shared_prefix
from align.modeling.logprobs import token_logps
from align.modeling.pairs import pair_tokens
from align.modeling.prefix_support import enable_shared_prefix
from tests.modeling import tiny

PAIRS = ((40, 11, 17), (3, 5, 30), (70, 2, 9), (130, 60, 61))  # tokens of prompt, chosen, rejected: several blocks
SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.1}


@pytest.fixture
def model(device):
    return tiny.causal(dtype=torch.float32, **SIZES).to(device)


def pairs() -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(2, tiny.VOCAB, (n,), generator=generator).tolist()  # noqa: E731
    return [{"prompt_ids": draw(p), "chosen_ids": draw(c), "rejected_ids": draw(r)} for p, c, r in PAIRS]


def logps_and_gradients(model, batch, device, autocast: bool):
    """logps [2B, T] and the flat gradient of a DPO-like loss."""
    model.zero_grad()
    batch = {name: value.to(device) for name, value in batch.items()}
    with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
        tokens = pair_tokens(model, batch)
        chosen, rejected = tokens.logps.sum(-1).chunk(2)
        loss = -nn.functional.logsigmoid((chosen - rejected) / 20).sum()
    loss.backward()
    return tokens.logps.detach(), torch.cat([p.grad.flatten().float() for p in model.parameters()])


def test_shared_rows_are_as_close_to_float32_as_padded_ones(model, device, monkeypatch):
    """On a GPU through FlexAttention, elsewhere through SDPA; both in bfloat16."""
    flexed, flex = [], shared_prefix.flex
    monkeypatch.setattr(shared_prefix, "flex", lambda *args, **kw: flexed.append(args[0].dtype) or flex(*args, **kw))
    padded, shared = PairCollator(tiny.PAD)(pairs()), SharedPrefixCollator()(pairs())
    exact_logps, exact = logps_and_gradients(model, padded, device, autocast=False)
    plain_logps, plain = logps_and_gradients(model, padded, device, autocast=True)
    assert enable_shared_prefix(model, max_length=256) is None
    flexed.clear()
    ours_logps, ours = logps_and_gradients(model, shared, device, autocast=True)
    assert flexed == ([torch.bfloat16] * 2 if device == "cuda" else [])
    assert (ours_logps - exact_logps).abs().mean() <= 1.5 * (plain_logps - exact_logps).abs().mean()
    assert 0 < (plain - exact).norm() < 0.1 * exact.norm()  # rounding, and no more
    assert (ours - exact).norm() <= 1.5 * (plain - exact).norm()


def test_shared_rows_do_not_see_each_other(model, device):
    """Another chosen completion moves no log-prob of the rejected one."""
    assert enable_shared_prefix(model, max_length=256) is None
    rows = pairs()
    before, _ = logps_and_gradients(model, SharedPrefixCollator()(rows), device, autocast=True)
    for row in rows:  # the first token is kept: a common beginning would move into the prefix
        row["chosen_ids"][1:] = [2 + (token - 1) % (tiny.VOCAB - 2) for token in row["chosen_ids"][1:]]
    after, _ = logps_and_gradients(model, SharedPrefixCollator()(rows), device, autocast=True)
    assert not torch.equal(before[: len(rows)], after[: len(rows)])
    torch.testing.assert_close(after[len(rows) :], before[len(rows) :], rtol=0, atol=0 if device == "cpu" else 1e-2)


def test_log_probs(model, device):
    """The tiled head against a plain forward pass, padded on the left; and against float32."""
    ids, mask = (t.to(device) for t in tiny.rows(lengths=(90, 33, 120), side="left"))
    found = {}
    for name, autocast in (("float32", False), ("bfloat16", True)):
        with torch.no_grad(), torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
            logits = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
            ours = token_logps(model, ids, mask)
        plain = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        seen = (mask[:, :-1] * mask[:, 1:]).bool()
        found[name] = ours[..., -plain.shape[1] :][seen]
        tolerance = 1e-4 if name == "float32" else 0.1
        torch.testing.assert_close(found[name], plain[seen], rtol=0, atol=tolerance)
    assert 0 < (found["bfloat16"] - found["float32"]).abs().mean() < 0.05


def test_gradients_of_the_tiled_head(device):
    """Confident tokens included, as exact as one dense autocast pass, and the same every time."""
    from align.modeling.heads import LogitTransform, head_of
    from align.modeling.token_values import token_values
    from tests.modeling.test_head_gradients import D, N, V, errors, inputs, layer_of

    weight, bias, targets, hidden, _ = inputs()
    factors = torch.randn(N, generator=torch.Generator().manual_seed(1)) / 16

    def gradient(how: str) -> torch.Tensor:
        wide = torch.float64 if how == "exact" else torch.float32
        layer, states = layer_of(weight, bias, wide).to(device), hidden.to(device, wide, copy=True).requires_grad_()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=how != "exact"):
            if how == "tiled":
                logps = token_values(
                    head_of(layer, V, LogitTransform()), states, targets.to(device), chunk_size=8
                ).logps
            else:
                logps = layer(states).to(wide).log_softmax(-1).gather(-1, targets.to(device)[:, None])[:, 0]
        (logps * factors.to(device)).sum().backward()
        assert states.grad.shape == (N, D)
        return torch.cat([states.grad.double().flatten(), layer.weight.grad.double().flatten()])

    exact, dense, tiled = (gradient(how) for how in ("exact", "dense", "tiled"))
    assert errors(tiled, exact) <= 1.25 * errors(dense, exact)
    assert torch.equal(tiled, gradient("tiled"))
