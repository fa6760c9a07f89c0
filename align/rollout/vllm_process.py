"""What an in-process vLLM engine does to the process that it lives in, and how that is undone.

Starting one re-seeds torch, numpy and python, replaces `torch.set_num_threads` and two functions of `torch.accelerator`
by ones that do nothing (on CPUs), writes environment variables that child processes would inherit (LD_PRELOAD,
LOCAL_WORLD_SIZE, TORCHINDUCTOR_...) and initialises `torch.distributed`. Ending one destroys the default process group,
even if that is the trainer's.
"""

import gc
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from align.rollout.engine import preserved_random_states

# In process, or the trainer's tensors could not be handed over. And no call home: see `VLLM_NO_USAGE_STATS` in its docs.
STARTING = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
DEFAULTS = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}

# They warn of what is meant to be: there is no tokenizer to warm up, and threads are set by the trainer.
NOISY = ("vllm.renderers.base", "vllm.v1.worker.cpu_worker")


@contextmanager
def contained_start() -> Iterator[None]:
    """Undo what starting an engine does to the process. vLLM caches its own settings before the variables go."""
    environment, threads = dict(os.environ), torch.get_num_threads()
    replaced = [(torch, "set_num_threads"), (torch.accelerator, "synchronize"), (torch.accelerator, "empty_cache")]
    originals = [(owner, name, getattr(owner, name)) for owner, name in replaced]
    levels = {name: logging.getLogger(name).level for name in NOISY}
    os.environ.update(STARTING)
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with preserved_random_states(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)


class ProcessGroups:
    """Keeps vLLM's process groups and the trainer's apart.

    Where the trainer has a group, vLLM makes its own one-rank groups inside it, which all ranks must do together.
    Where there is none, vLLM makes a default group of one process; it is hidden once the engine stands (a single
    process never communicates through it), so that `torch.distributed.is_initialized()` tells the truth and the trainer
    can still initialise its own.
    """

    def __init__(self):
        self._hidden = None
        self._had_group = dist.is_initialized()

    def after_start(self) -> None:
        if not self._had_group and dist.is_initialized():
            self._hidden, dist.group.WORLD = dist.group.WORLD, None

    @contextmanager
    def during_end(self) -> Iterator[None]:
        """Let vLLM destroy its own groups and no other."""
        destroy = dist.destroy_process_group
        if self._hidden is not None and not dist.is_initialized():
            dist.group.WORLD = self._hidden  # the only default group is vLLM's: it may destroy it as it wants to
            yield
            return
        alive = dist.is_initialized()  # if the trainer's group is gone, its subgroups went with it

        def destroy_own(group=None):
            group = group or self._hidden
            if group is not None and alive:
                destroy(group)

        dist.destroy_process_group = destroy_own
        try:
            yield
        finally:
            dist.destroy_process_group = destroy


def end(llm, groups: ProcessGroups) -> None:
    """Shut a `vllm.LLM` down and free what it held. Also run at interpreter exit, before vLLM's own clean-up."""
    with groups.during_end(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        llm.llm_engine.engine_core.shutdown()
    gc.collect()
