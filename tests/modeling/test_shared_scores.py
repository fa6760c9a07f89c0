"""Scores of pairs whose answers share their prompt: the scores and gradients of padded batches."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from align.data import PairCollator, SharedPrefixCollator
from align.modeling.prefix_support import enable_shared_scores
from align.modeling.scores import last_of_rests, pair_scores
from tests.modeling import tiny
from tests.modeling.pair_models import make_classifier, pairs


def gradients(model, batch):
    model.zero_grad()
    scores = pair_scores(model, batch)
    chosen, rejected = scores.chunk(2)
    nn.functional.logsigmoid(chosen - rejected).sum().backward()
    return scores.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(model):
    padded, shared = PairCollator(tiny.PAD)(pairs()), SharedPrefixCollator()(pairs())
    assert shared["input_ids"].numel() < padded["input_ids"].numel() / 2
    (expected, expected_gradients), (actual, actual_gradients) = (gradients(model, b) for b in (padded, shared))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)
    assert expected.std() > 0.01 and expected_gradients
    torch.testing.assert_close(actual_gradients, expected_gradients, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["llama", "grouped queries", "qwen2", "qwen3", "gpt2", "neox"])
def test_equals_padded_batches(name):
    model = make_classifier(name)
    assert enable_shared_scores(model, max_length=32) is None
    assert_same(model)


def test_with_an_adapter():
    model = get_peft_model(
        make_classifier("llama"), LoraConfig(task_type="SEQ_CLS", r=2, init_lora_weights=False)
    ).double()
    assert enable_shared_scores(model, None) is None
    assert_same(model)


def test_where_sequences_end():
    table = torch.tensor([[[[3, 2, 4], [5, 0, 2], [1, 3, 0]]]])
    #      ppp cc rrrr | ppppp - rr | p ccc -
    assert last_of_rests(table).tolist() == [4, 13, 19, 8, 15, 16]


def test_models_that_cannot_are_left_as_they_are():
    encoder = tiny.classifier("bert")
    before = encoder.config._attn_implementation
    assert "differ" in enable_shared_scores(encoder, None)
    assert encoder.config._attn_implementation == before
    silent = make_classifier("llama")
    nn.init.zeros_(silent.score.weight)
    assert "scores are all 0" in enable_shared_scores(silent, None)
