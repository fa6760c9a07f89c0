"""Rollouts with vLLM, in the trainer's process, on CPUs and CUDA GPUs."""

import difflib
import logging
import tempfile
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor

from align.distributed.ranks import anywhere, in_all
from align.errors import AlignError, ConfigError, RolloutError
from align.modeling.dequantize import of_ordinary_weights
from align.modeling.logprobs import language_model
from align.modeling.text_part import text_model
from align.rollout.adapters import A, B, lora_layers, lora_rank, why_merged, with_adapter
from align.rollout.engine import RolloutEngine
from align.rollout.identity import Fingerprints
from align.rollout.types import Completion, OnDone, Request
from align.rollout.vllm_cpu import (
    CPU_BLOCK,
    GIB,
    USE_TRANSFORMERS,
    check_head_size,
    draw_by_row,
    kv_cache_bytes,
    repack_heads,
)
from align.rollout.vllm_process import shut_down, starting
from align.rollout.vllm_ranks import SharingRanks
from align.rollout.vllm_requests import completion, told_of, vllm_params
from align.rollout.vllm_versions import known_names
from align.rollout.weights import check_supported, checkpoint_shapes, checkpoint_weights

if TYPE_CHECKING:
    from align.rollout.vllm_lora import AdapterSlot

logger = logging.getLogger(__name__)
T = TypeVar("T")


class VLLMEngine(RolloutEngine):
    """A vLLM engine in this process. On CUDA with several ranks, each rank has one on its own GPU.

    It starts from the model's configuration alone, with random weights, and learns where vLLM puts each tensor
    (`vllm_weights`); the first push replaces them, so no checkpoint is written and a start goes through the same code,
    and the same proof, as every later push.
    """

    name = "vllm"
    tells = True

    def __init__(
        self,
        model,
        tokenizer=None,
        *,
        max_model_len,
        seed=0,
        max_num_seqs=256,
        kv_cache_gib=None,
        gpu_memory_utilization=0.3,
        engine_options=None,
        tensor_parallel=1,
        sleep=False,
        sync_tolerance=None,
        dtype=None,
    ):
        super().__init__(
            model, tokenizer, max_model_len=max_model_len, seed=seed, sync_tolerance=sync_tolerance, dtype=dtype
        )
        check_supported(model)
        options = {
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "kv_cache_gib": kv_cache_gib,
            "gpu_memory_utilization": gpu_memory_utilization,
            "sleep": sleep,
            "further": engine_options or {},
        }
        self._sleeps, self._discarded = sleep, False
        self._asleep: set[str] = set()
        self._sharing = SharingRanks(tensor_parallel) if tensor_parallel > 1 else None
        self.together = self._sharing is not None
        reason = why_merged(model) if isinstance(model, PeftModel) else None
        if isinstance(model, PeftModel) and reason is None and self.together:
            reason = "the processes that share an engine hold slices of it, which could not be proved"
        self._slot: AdapterSlot | None = None
        if isinstance(model, PeftModel) and reason is None:
            self._launch(model, options, lora_rank(model))
            (self._slot,) = self._llm.collective_rpc(adapter_slot)
            if missing := self._slot.missing([name for name, _, _ in lora_layers(model)]):
                reason = f"its {type(text_model(language_model(model))).__name__} has no adapters on {missing[0]}"
                self._slot = None
                self._finalizer()
        if self._slot is None:
            if reason is not None:
                logger.warning(
                    "vLLM cannot hold this adapter beside the weights (%s): it is merged into them at each push, in "
                    "float32, then cast to %s. rollout/arrived_share says how much of it that leaves",
                    *(reason, self.dtype),
                )
            self._launch(model, options, None)
        self._pushes = 0
        self._start(model)

    def _launch(self, model, options: dict, rank: int | None) -> None:
        """Start vLLM, with room for one adapter of this rank."""
        core = text_model(language_model(model))
        shapes = checkpoint_shapes(model, merged=rank is None)
        try:
            with known_names(), starting(), self._step("the start"):
                started = start_llm(core, shapes, dtype=self.dtype, rank=rank, sharing=self._sharing, **options)
                self._llm, self._on_cpu = started
        except AlignError:
            raise
        except (ValueError, RuntimeError, NotImplementedError, AssertionError) as error:  # by assert: too little memory
            reason = f"vLLM could not start for {type(core).__name__}: {error}"
            raise RolloutError(f"{reason}\nIf it cannot run this model, {USE_TRANSFORMERS}") from error
        # Runs at the latest when the interpreter ends, and before vLLM's own, which would destroy the trainer's group.
        self._finalizer = weakref.finalize(self, shut_down, self._llm)
        if self._on_cpu:
            self._llm.collective_rpc(draw_by_row)
        (self._placement,) = self._llm.apply_model(placement_of)
        if not self._placement.direct:
            logger.warning(
                "%s: weights are pushed through vLLM's slower reload and cannot be proved bit by bit, but by log-probs",
                self._placement.reason,
            )

    def _weights(self, model, everything):
        if self._slot is None:
            return checkpoint_weights(model, self.dtype, self.arrived)
        self._pushes += not everything
        return with_adapter(
            model, self.dtype, self.arrived, None if everything else self._pushes, self._placement.parts
        )

    def sleep(self) -> bool:
        """Frees the weights, which the next push brings, and keys and values. An adapter's base weights never come
        again, and vLLM's own reload needs the old ones in place: they go to the host's memory."""
        if self._sleeps and not self._asleep:
            self._discarded = self._slot is None and self._placement.direct
            self._llm.sleep(level=2 if self._discarded else 1)
            self._asleep = {"weights", "kv_cache"}
        return self._discarded

    def _wake(self, *tags: str) -> None:
        """Take memory back. tags: vLLM's names of what lay in it, weights first: whatever is woken first, vLLM then
        writes the buffers that it kept into their memory."""
        for tag in tags:
            if tag in self._asleep:
                self._llm.wake_up(tags=[tag])
                self._asleep.discard(tag)

    def _wake_to_be_freed(self) -> None:
        """vLLM frees what its sleep has unmapped with an error, after which no engine with `sleep` starts."""
        if self._asleep:
            torch.cuda.empty_cache()  # of the trainer, which may have filled the room
        try:
            self._wake("weights", "kv_cache")
        except RuntimeError as error:
            logger.warning("no further vLLM engine with rollout.sleep will start in this process: %s", error)

    def _check_awake(self) -> None:
        """Before anything but a push."""
        if self._discarded:
            raise RolloutError("the vLLM engine sleeps and holds no weights: push some before it is used")
        self._wake("weights", "kv_cache")

    def _load(self, weights) -> None:
        self._wake("weights")  # keys and values only when the trainer's copies are gone
        self._load_weights(weights)
        self._discarded = False
        self._wake("kv_cache")

    def _load_weights(self, weights) -> None:
        adapter = {}

        def base():
            for name, tensor in weights:
                if name.endswith((A, B)):
                    adapter[name] = tensor
                else:
                    yield name, tensor

        if self._slot is not None and self._pushes:
            for _ in base():
                pass  # compared, not sent again
        else:
            self._load_base(base())
        if self._slot is not None:
            self._slot.install(adapter)
            self._shapes = {name: tensor.shape for name, tensor in adapter.items()}

    def _load_base(self, weights) -> None:
        if self._placement.direct:
            self._placement.load(weights)
            return
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if self._on_cpu:
            self._llm.apply_model(repack_heads)

    def _parts(self, name: str, tensor: Tensor) -> list[Tensor]:
        if name.endswith((A, B)):
            return [tensor]
        return self._placement.pieces(name, tensor) if self._placement.direct else []

    def _held(self, names) -> Fingerprints | None:
        self._check_awake()
        if not self._placement.direct:
            return None
        base = [name for name in names if not name.endswith((A, B))]
        held = self._placement.held(base)
        return held if self._slot is None else held | self._slot.fingerprints(self._shapes)

    def _requests(self, prompts, params) -> list[Request]:
        checked = partial(super()._requests, prompts, params)
        return self._in_all("the check of requests", checked)

    def _prove(self, sent) -> int | None:
        proved = partial(super()._prove, sent)
        return self._in_all("the proof of weights", proved)

    def anyone(self, wants: bool) -> bool:
        with self._step("the question who wants completions"):
            return anywhere(wants) if self.together else wants  # all engines: a call checks its requests in all ranks

    def _in_all(self, what: str, action: Callable[[], T]) -> T:
        """If ranks share the engine, a failure in all of them: the others would wait for one that has failed."""
        with self._step(what):
            return in_all(action) if self.together else action()

    def _step(self, what: str) -> AbstractContextManager:
        """Around what ranks that share the engine do together."""
        return nullcontext() if self._sharing is None else self._sharing.watch.step(what)

    def _complete(self, requests: list[Request], progress: bool, done: OnDone | None = None) -> list[list[Completion]]:
        answers = partial(self._answers, progress=progress)
        if self._sharing is None:
            return answers(requests, done)
        return self._sharing.complete(requests, answers, done)

    def _answers(self, requests: list[Request], done: OnDone | None, progress: bool) -> list[list[Completion]]:
        self._check_awake()
        if self._llm.llm_engine.has_unfinished_requests():
            raise RolloutError("an interrupted call left unfinished requests in the vLLM engine: make a new one")
        # Keys and values of earlier weights must not be used again, and a call must not depend on the calls before it.
        self._llm.reset_prefix_cache()
        adapter = {} if self._slot is None else {"lora_request": self._slot.request()}
        prompts = [{"prompt_token_ids": request.prompt_ids} for request in requests]
        # Without the stance, vLLM's two compiled helpers (sampling, rank of the token) cost 6 to 30 s on their first
        # use on a CPU and gain nothing. It does not touch what the trainer compiles.
        with (
            torch.compiler.set_stance("force_eager") if self._on_cpu else nullcontext(),
            self._sharing.watch.moving(self._llm.llm_engine) if self._sharing is not None else nullcontext(),
            told_of(self._llm, requests, done) if done is not None else nullcontext(),
        ):
            outputs = self._llm.generate(prompts, [vllm_params(r) for r in requests], use_tqdm=progress, **adapter)
        return [[completion(o, r) for o in out.outputs] for r, out in zip(requests, outputs, strict=True)]

    def _free(self) -> None:
        self._wake_to_be_freed()
        self._llm = self._placement = self._slot = None
        self._finalizer()
        if self._sharing is not None:
            self._sharing.watch.close()


def placement_of(model):
    """What the loader learned about this worker's model (runs inside vLLM)."""
    placement = vars(model)["align_placement"]
    placement.after_processing(model)
    return placement


def adapter_slot(worker) -> "AdapterSlot":
    """(runs inside vLLM)"""
    from align.rollout.vllm_lora import AdapterSlot

    return AdapterSlot(worker)


def start_llm(core, shapes, sharing: SharingRanks | None = None, **options):
    """A `vllm.LLM` with the architecture of `core` and random weights, and whether it runs on a CPU. sharing: with whom
    it is one engine."""
    import vllm
    from vllm.platforms import current_platform

    own = llm_options(core, shapes, **options)
    if sharing is not None:
        own |= sharing.options(own.get("kv_cache_memory_bytes"))
    elif not current_platform.is_cpu() and dist.is_initialized():
        own["distributed_executor_backend"] = "external_launcher"  # each rank on its own GPU
    meeting = sharing.meeting() if sharing is not None and current_platform.is_cpu() else nullcontext()
    with tempfile.TemporaryDirectory() as folder, meeting:
        write_config(core, options["dtype"], folder)
        return vllm.LLM(folder, **own), current_platform.is_cpu()


def llm_options(
    core,
    shapes,
    *,
    dtype,
    rank,
    max_model_len,
    max_num_seqs,
    kv_cache_gib,
    gpu_memory_utilization,
    further,
    sleep=False,
) -> dict:
    """What vLLM is started with, in this process or as a server."""
    from vllm.platforms import current_platform

    from align.rollout.vllm_lora import lora_options
    from align.rollout.vllm_weights import LOAD_FORMAT

    on_cpu = current_platform.is_cpu()
    check_model(core, dtype, on_cpu)
    options = {
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "dtype": str(dtype).removeprefix("torch."),
        "load_format": LOAD_FORMAT,
        "model_loader_extra_config": {"shapes": {name: tuple(shape) for name, shape in shapes.items()}},
        "model_impl": "vllm",
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # not the model's: end tokens and defaults are ours
        "logprobs_mode": "processed_logprobs",
        "disable_log_stats": True,
        "seed": 0,  # of draws that no request here makes: each has its own
    }
    if rank is not None:
        options |= lora_options(rank)
    if sleep and on_cpu:
        raise ConfigError("rollout.sleep gives GPU memory back, and vLLM runs on the CPU here: leave it out")
    if sleep:
        options["enable_sleep_mode"] = True
    if on_cpu:
        options["enforce_eager"] = True
        options["block_size"] = CPU_BLOCK
        # vLLM takes back the draw of a seeded request whose prompt is processed in parts, which raises on CPUs
        options["enable_chunked_prefill"] = False
        options["kv_cache_memory_bytes"] = kv_cache_bytes(core, dtype, max_model_len, max_num_seqs, kv_cache_gib)
    else:
        options["gpu_memory_utilization"] = gpu_memory_utilization
        if kv_cache_gib is not None:
            options["kv_cache_memory_bytes"] = int(kv_cache_gib * GIB)
    check_further(further, options)
    return options | further


def check_further(further: dict, options: dict) -> None:
    """Refuse `rollout.engine_options` that vLLM does not know, or that have another value here (on CPUs)."""
    from vllm.engine.arg_utils import EngineArgs

    known = [field.name for field in fields(EngineArgs)]
    for name in further:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; nearest valid: {near[0]}" if near else ""
            raise ConfigError(f"rollout.engine_options: vLLM has no argument {name}{hint}")
        if options.get(name, further[name]) != further[name]:
            raise ConfigError(f"rollout.engine_options: {name} must be {options[name]!r} here: leave it out")


def write_config(core, dtype: torch.dtype, folder: str) -> None:
    """The model's configuration, as vLLM reads it from a checkpoint folder."""
    config = of_ordinary_weights(core.config)
    config.architectures = [architecture(core)]
    config.dtype = dtype
    config.save_pretrained(folder)


def architecture(core) -> str:
    return type(core).__name__.removeprefix("FSDP")  # FSDP2 renames the class


def check_model(core, dtype: torch.dtype, on_cpu: bool) -> None:
    """Refuse what vLLM cannot run before it takes seconds to say so in its own words."""
    import vllm

    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ConfigError(f"vLLM does not run {dtype} models: set rollout.dtype: float32, or {USE_TRANSFORMERS}")
    # For the others vLLM runs transformers' own model and rewrites its class for that: the trainer's would break.
    entry = vllm.ModelRegistry.models.get(architecture(core))
    if entry is None or vars(entry).get("module_name", "").endswith(".transformers"):
        raise ConfigError(f"vLLM has no implementation of its own for {architecture(core)}: {USE_TRANSFORMERS}")
    if not on_cpu:
        return
    check_head_size(core.config.get_text_config())
