"""A mixture of experts trains without its load-balancing loss, and that is said."""

import pytest
import transformers as tf

from align.errors import ConfigError
from align.trainers.core.guards import check_experts
from tests.modeling import tiny


def mixture(**options):
    sizes = {"moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
    return tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**tiny.SIZES, **sizes, **options))


def test_it_is_said(caplog):
    check_experts(mixture())
    assert "router_aux_loss_coef 0.001" in caplog.text
    caplog.clear()
    check_experts(mixture(router_aux_loss_coef=0.0))
    check_experts(tiny.causal())
    assert not caplog.text


def test_asked_for_it_is_refused():
    with pytest.raises(ConfigError, match="output_router_logits: true"):
        check_experts(mixture(output_router_logits=True))
