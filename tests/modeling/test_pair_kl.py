"""KL per completion token against the dense formula: both layouts, each kind of reference, gradients included."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from align.data import PairCollator, SharedPrefixCollator
from align.modeling.load import Reference, reference_of
from align.modeling.pairs import at_completions, completions, pair_inputs, pair_tokens, pair_tokens_with_kl
from align.modeling.prefix_support import enable_shared_prefix
from tests.modeling import tiny
from tests.modeling.pair_models import make, pairs

LORA = {"r": 2, "init_lora_weights": False}
ADAPTERS = {
    "layers": LoraConfig(target_modules=["q_proj", "down_proj"], **LORA),
    "head": LoraConfig(target_modules=["q_proj", "lm_head"], **LORA),
    "whole head": LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], **LORA),
}


def policy_and_reference(kind):
    torch.manual_seed(1)
    if kind == "model":
        policy, ref = make("llama"), make("llama")
        with torch.no_grad():
            for p in policy.parameters():
                p.add_(torch.randn_like(p), alpha=0.1)
        return policy, reference_of(policy, ref)
    policy = get_peft_model(make("llama"), ADAPTERS[kind]).double()
    if kind == "whole head":
        with torch.no_grad():
            policy.get_base_model().lm_head.modules_to_save["default"].weight.mul_(1.2)
    return policy, reference_of(policy)


def dense(policy, reference, batch):
    """Per completion token: policy log-prob, KL, reference log-prob; from whole logits of padded rows."""
    places = completions(batch)

    def log_probs(model):
        return model(**pair_inputs(model, batch)).logits.log_softmax(-1).flatten(0, 1)[places.sources]

    with reference.active() as ref_model:
        log_q = log_probs(ref_model)
    log_p = log_probs(policy)
    kl = (log_q.exp() * (log_q - log_p)).sum(-1)
    logps, ref_logps = (x.gather(-1, places.ids[..., None])[..., 0] for x in (log_p, log_q))
    return [x * places.mask for x in (logps, kl, ref_logps)]


def gradients(policy, logps, kl):
    policy.zero_grad()
    (logps.sum() + 0.3 * (kl * torch.arange(kl.shape[1]).add(1)).sum()).backward()
    return {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["model", *ADAPTERS])
def test_equals_the_dense_formula(kind):
    policy, reference = policy_and_reference(kind)
    rows = pairs()
    padded = PairCollator(tiny.PAD)(rows)
    expected = dense(policy, reference, padded)
    expected_gradients = gradients(policy, *expected[:2])
    assert expected[1].max() > 1e-3 and expected[1].min() >= 0 and expected_gradients
    assert enable_shared_prefix(policy, None) is None
    if kind == "model":
        assert enable_shared_prefix(reference.model, None) is None
    for batch in (padded, SharedPrefixCollator()(rows)):
        ours, ref = pair_tokens_with_kl(policy, reference, batch, chunk_size=9)
        for actual, wanted in zip((ours.logps, ours.kl, ref.logps), expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-9)
        assert not ref.logps.requires_grad and ref.kl is None and torch.equal(ref.mask, ours.mask)
        actual_gradients = gradients(policy, ours.logps, ours.kl)
        assert actual_gradients.keys() == expected_gradients.keys()
        for name, gradient in expected_gradients.items():
            torch.testing.assert_close(actual_gradients[name], gradient, rtol=0, atol=1e-9)


def test_policy_that_is_its_reference():
    policy = make("llama", torch.float32)
    ours, ref = pair_tokens_with_kl(policy, reference_of(policy), PairCollator(tiny.PAD)(pairs()))
    assert ours.kl.eq(0).all() and torch.equal(ours.logps, ref.logps)


def test_hidden_states_of_the_reference_in_both_layouts():
    model, rows = make("llama"), pairs()
    assert enable_shared_prefix(model, None) is None
    found = []
    for batch in (PairCollator(tiny.PAD)(rows), SharedPrefixCollator()(rows)):
        with Reference(model, adapter_off=False).active() as ref_model:
            states = ref_model(**pair_inputs(ref_model, batch), output_hidden_states=True).hidden_states
        found.append(torch.stack([at_completions(s, completions(batch)) for s in states[1:]]))
    assert found[0].shape == (2, 12, 7, 16)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-9)


def test_sums_of_squares():
    model, batch = make("llama"), PairCollator(tiny.PAD)(pairs())
    tokens = pair_tokens(model, batch, sum_squares=True)
    p = model(**pair_inputs(model, batch)).logits.softmax(-1)
    expected = at_completions(p.square().sum(-1).log(), completions(batch))
    torch.testing.assert_close(tokens.log_sum_sq_probs, expected, rtol=0, atol=1e-9)
    assert not tokens.log_sum_sq_probs.requires_grad


def test_no_tensor_of_tokens_by_vocabulary():
    """KL included, forward and backward: nothing near the size of all logits, in either kind of head."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        values = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor):
                    self.values = max(self.values, tensor.untyped_storage().nbytes() // 4)  # not an expanded view
            return out

    model = tiny.causal(dtype=torch.float32, vocab_size=800)
    rows = [{"prompt_ids": [5] * 3, "chosen_ids": [6] * 30, "rejected_ids": [7] * 30}] * 8
    reference = reference_of(model)
    for adapted in (False, True):
        if adapted:
            model = get_peft_model(model, LoraConfig(target_modules=["lm_head"], r=2))
            reference = reference_of(model)
        with Largest() as largest:
            ours, _ = pair_tokens_with_kl(model, reference, PairCollator(tiny.PAD)(rows), chunk_size=16)
            (ours.logps + ours.kl).sum().backward()
        assert largest.values < 480 * 800 / 10


def test_gradient_of_the_kl_alone():
    """A loss without the log-probs themselves."""
    policy, reference = policy_and_reference("model")
    batch = PairCollator(tiny.PAD)(pairs())
    pair_tokens_with_kl(policy, reference, batch)[0].kl.sum().backward()
    ours = {n: p.grad.clone() for n, p in policy.named_parameters()}
    policy.zero_grad()
    dense(policy, reference, batch)[1].sum().backward()
    for name, p in policy.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, rtol=0, atol=1e-9)
