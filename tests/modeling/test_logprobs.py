import pytest
import torch
import transformers

from align.modeling import logprobs
from align.modeling.logprobs import token_logps
from tests.modeling import tiny

NEWER = pytest.mark.skipif(
    not hasattr(transformers, "HyperCLOVAXConfig"), reason="needs HyperCLOVA X (transformers 5.17)"
)
KINDS = ["llama", "gemma2", "granite", "cohere", pytest.param("hyperclovax", marks=NEWER), "gpt2"]


def plain(model, input_ids, attention_mask, temperature=1.0):
    """Row by row without padding, from the model's full logits."""
    out = torch.zeros(input_ids.shape[0], input_ids.shape[1] - 1, dtype=torch.float64)
    for i, mask in enumerate(attention_mask.bool()):
        ids = input_ids[i][mask][None]
        logps = (model(input_ids=ids).logits / temperature).log_softmax(-1)[0, :-1]
        start = int(mask.nonzero()[0])
        out[i, start : start + ids.shape[1] - 1] = logps.gather(-1, ids[0, 1:, None])[:, 0]
    return out


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_plain_computation(kind, side):
    model = tiny.causal(kind)
    ids, mask = tiny.rows(side=side)
    weights = torch.randn(ids.shape[0], ids.shape[1] - 1, dtype=torch.float64)
    gradients = []
    for compute in (plain, lambda *a, temperature: token_logps(*a, temperature=temperature, chunk_size=4)):
        model.zero_grad()
        logps = compute(model, ids, mask, temperature=0.7)
        (logps * weights).sum().backward()
        gradients.append((logps.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}))
    (expected, expected_gradients), (actual, actual_gradients) = gradients
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)
    atol = 1e-9 if kind in ("llama", "gpt2") else 1e-6  # the other architectures normalise in float32
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(
            actual_gradients[name], gradient, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert logprobs._separable[model]


@pytest.mark.parametrize("kind", ["falcon_h1", "recurrent_gemma"])
def test_models_with_a_state(kind):
    """Their scans are computed in float32. The logits are multiplied, and softly capped, by options of other names."""
    model = tiny.causal(kind)
    ids, mask = tiny.rows()
    torch.testing.assert_close(token_logps(model, ids, mask), plain(model, ids, mask), rtol=0, atol=1e-6)
    assert logprobs._separable[model]


def test_only_the_wanted_tokens():
    model = tiny.causal()
    ids, mask = tiny.rows(side="left")
    completion = torch.zeros_like(mask)
    completion[:, -2:] = 1
    everything, wanted = token_logps(model, ids, mask), token_logps(model, ids, mask, mask=completion)
    torch.testing.assert_close(wanted[:, -2:], everything[:, -2:], rtol=0, atol=1e-12)
    assert wanted[:, :-2].eq(0).all() and everything[:, :2].eq(0).sum() > 0
    assert token_logps(model, ids, mask, mask=torch.zeros_like(mask)).eq(0).all()


def test_entropy():
    model = tiny.causal()
    ids, mask = tiny.rows()
    logps, entropy = token_logps(model, ids, mask, temperature=2.0, chunk_size=3, return_entropy=True)
    p = (model(input_ids=ids[:1]).logits / 2).log_softmax(-1)[0, :-1]
    torch.testing.assert_close(entropy[0], -(p.exp() * p).sum(-1), rtol=0, atol=1e-9)
    assert logps.requires_grad and not entropy.requires_grad


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "lm_head"]])
def test_lora(targets):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny.causal(), LoraConfig(r=2, target_modules=targets, init_lora_weights=False)).double()
    ids, mask = tiny.rows(side="left")
    torch.testing.assert_close(token_logps(model, ids, mask, chunk_size=4), plain(model, ids, mask), rtol=0, atol=1e-9)
    token_logps(model, ids, mask, chunk_size=4).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    plain(model, ids, mask).sum().backward()
    assert gradients
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(gradients[name], p.grad, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_virtual_tokens_of_prompt_learning_stand_before_the_row(kind, monkeypatch):
    """The log-probs of other positions were taken: DPO on a prompt-tuned policy trained on them."""
    from peft import PromptTuningConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(tiny.causal(kind), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")).double()
    ids, mask = tiny.rows()
    rows = [model(input_ids=row[None, :n]).logits[0, 3:-1] for row, n in zip(ids, mask.sum(-1).tolist(), strict=True)]
    expected = [x.log_softmax(-1).gather(-1, row[1 : len(x) + 1, None]) for x, row in zip(rows, ids, strict=True)]
    wanted = torch.nn.utils.rnn.pad_sequence([x[:, 0] for x in expected], batch_first=True)
    torch.testing.assert_close(token_logps(model, ids, mask), wanted, rtol=0, atol=1e-9)
    monkeypatch.setattr(logprobs, "_head_can_run_alone", lambda core: False)
    torch.testing.assert_close(token_logps(model, ids, mask), wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("change", [lambda x: 1.5 * x, lambda x: 30 * (x / 30).tanh()], ids=["scale", "soft cap"])
def test_a_head_that_does_more_is_not_trusted(change, caplog):
    """An architecture whose logits are changed in a way that the config does not tell: full logits, said once. A soft
    cap of 30 moves the small logits of this model by 0.1 %."""
    model = tiny.causal(initializer_range=0.2)
    inner = model.forward

    def forward(*args, **kwargs):
        output = inner(*args, **kwargs)
        output.logits = change(output.logits)
        return output

    model.forward = forward
    ids, mask = tiny.rows()
    for _ in range(2):
        torch.testing.assert_close(token_logps(model, ids, mask), plain(model, ids, mask), rtol=0, atol=1e-9)
    assert [r.levelname for r in caplog.records] == ["WARNING"]


def test_large_logits_are_never_made():
    """The peak of a backward pass stays far below one [B, T, V] tensor in float32."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        values = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.values = max(self.values, out.numel())
            return out

    model = tiny.causal(dtype=torch.float32, vocab_size=800)
    ids, mask = tiny.rows(lengths=(32,) * 8)
    with Largest() as largest:
        token_logps(model, ids, mask, chunk_size=8).sum().backward()
    assert largest.values < ids.numel() * 800 / 10


def test_the_model_is_left_as_it_was():
    model = tiny.causal()
    ids, mask = tiny.rows()
    before = model(input_ids=ids, attention_mask=mask).logits
    token_logps(model, ids, mask)
    assert "forward" not in vars(model.lm_head) and not model._forward_hooks
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, before)


def test_bfloat16_weights_give_float32():
    model = tiny.causal(dtype=torch.bfloat16)
    ids, mask = tiny.rows()
    logps = token_logps(model, ids, mask)
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps.double(), plain(model.double(), ids, mask), rtol=0, atol=0.3)
