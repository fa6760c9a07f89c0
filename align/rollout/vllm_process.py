"""What in-process vLLM engines do to the process that they live in, and how that is undone.

Starting one re-seeds torch, numpy and python, replaces `torch.set_num_threads` and two functions of `torch.accelerator`
by ones that do nothing (on CPUs), writes environment variables that child processes would inherit (LD_PRELOAD,
LOCAL_WORLD_SIZE, TORCHINDUCTOR_...) and initialises `torch.distributed`. Ending one destroys the default process group,
even if that is the trainer's, or if another engine lives on. Not undone: memory stays bound to the NUMA node of the
process (on CPUs), and objects alive at the start are exempt from garbage collection until the last engine is closed.
"""

import gc
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from align.rollout.engine import preserved_random_states

FORCED = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # in process, or the trainer's tensors could not be handed over
# Errors only: a start warns ten times of what is meant to be (no tokenizer, eager mode), and each push of tied weights.
DEFAULTS = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
REPLACED = ((torch, "set_num_threads"), (torch.accelerator, "synchronize"), (torch.accelerator, "empty_cache"))


class _Shared:
    """vLLM keeps its process groups in globals, so all engines of a process share them.

    Where the trainer has a process group, they are one-rank groups inside it, which all ranks must make together. Where
    there is none, vLLM makes a default group of one process. It is hidden once the engine stands (a single process
    never communicates through it), so that `torch.distributed.is_initialized()` tells the truth and the trainer can
    still initialise its own.
    """

    engines = 0
    hidden_group: dist.ProcessGroup | None = None
    functions: list = []  # vLLM's in place of those in REPLACED


@contextmanager
def starting() -> Iterator[None]:
    """Undo what making a `vllm.LLM` inside this context does to the process. vLLM caches its own environment variables
    before they go. Counts the engine if all went well, else removes what a failed start leaves behind."""
    from vllm.model_executor.layers import rotary_embedding

    environment, functions, group = dict(os.environ), _get_functions(), dist.group.WORLD
    threads = torch.get_num_threads()
    os.environ.update({**DEFAULTS, **environment, **FORCED})
    if _Shared.engines and not _groups_alive():
        _destroy_groups()  # vLLM does not know that they are gone
    if _Shared.hidden_group is not None:
        dist.group.WORLD = _Shared.hidden_group
    try:
        with preserved_random_states(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            # kept by what the model's config says: an engine of another max_model_len would get LongRoPE's wrong table
            rotary_embedding._ROPE_DICT.clear()
            yield
        _Shared.engines += 1
    finally:
        if group is None:
            _Shared.hidden_group = dist.group.WORLD
        dist.group.WORLD = group
        _Shared.functions = _get_functions()
        _set_functions(functions)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        if _Shared.engines == 0:
            _destroy_groups()


def shut_down(llm) -> None:
    """Shut a `vllm.LLM` down and free what it held."""
    from vllm.distributed import parallel_state
    from vllm.v1.engine import core

    # Both would destroy the groups of the trainer and of other engines; the second is called since vLLM 0.33.
    ending = ((core, "cleanup_dist_env_and_memory"), (parallel_state, "destroy_model_parallel"))
    functions, kept = _get_functions(), [getattr(module, name) for module, name in ending]
    for module, name in ending:
        setattr(module, name, lambda: None)
    _set_functions(_Shared.functions)
    try:
        llm.llm_engine.engine_core.shutdown()
    finally:
        for (module, name), function in zip(ending, kept, strict=True):
            setattr(module, name, function)
        _set_functions(functions)
    _Shared.engines -= 1
    if _Shared.engines == 0:
        _destroy_groups()
    gc.collect()


def _destroy_groups() -> None:
    """Let vLLM destroy its own process groups and no other."""
    from vllm.distributed import cleanup_dist_env_and_memory

    hidden, _Shared.hidden_group = _Shared.hidden_group, None
    trainers, destroy = dist.group.WORLD, dist.destroy_process_group
    if trainers is None and _alive(hidden):
        dist.group.WORLD = hidden  # the only default group: vLLM may destroy it with all that hangs on it

    def destroy_own(group=None):
        group = group or hidden
        if _alive(group):
            destroy(group)

    dist.destroy_process_group = destroy_own
    try:
        cleanup_dist_env_and_memory()
    finally:
        dist.destroy_process_group, dist.group.WORLD = destroy, trainers


def _alive(group) -> bool:
    """Whether a process group still exists: destroying the default group destroys every other."""
    try:
        return group is not None and len(dist.get_process_group_ranks(group)) > 0
    except KeyError:
        return False


def _groups_alive() -> bool:
    from vllm.distributed import get_world_group

    return _alive(get_world_group().cpu_group)


def _get_functions() -> list:
    return [getattr(owner, name) for owner, name in REPLACED]


def _set_functions(functions: list) -> None:
    for (owner, name), function in zip(REPLACED, functions, strict=True):
        setattr(owner, name, function)
