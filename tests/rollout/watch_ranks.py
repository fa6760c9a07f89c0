"""Run by `tests.warm.run_ranks` on two processes that share a vLLM engine. The first, which keeps the store by which
they know of each other, is stopped while the second waits for it in a collective."""

import os
import signal
from datetime import timedelta

import torch.distributed as dist

from align.rollout import SamplingParams, make_engine, vllm_watch
from tests.rollout.rollout_models import llama
from tests.rollout.sharing_ranks import SHARED


def main() -> None:
    vllm_watch.BEAT = 0.1
    dist.init_process_group("gloo", timeout=timedelta(seconds=100))
    engine = make_engine(llama(), max_model_len=64, **SHARED)
    watch = engine._sharing.watch
    assert watch.seconds == 90  # nine tenths
    engine.generate([[5]], SamplingParams(2))
    dist.barrier()
    watch.seconds, watch.silent = 3.0, 1.0
    if dist.get_rank() == 0:
        engine._llm.llm_engine.step = lambda: os.kill(os.getpid(), signal.SIGSTOP)
    engine.generate([[5]], SamplingParams(2))


if __name__ == "__main__":
    main()
