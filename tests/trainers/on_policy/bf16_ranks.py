"""Run by `torchrun --nproc_per_node=2`: on-policy steps with FSDP2 in bfloat16, as `align launch --setup fsdp2` has it.

Arguments: the folder of a policy, a folder for results, back-ends. Writes what was logged, by back-end.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from align.data import toy
from align.modeling.load import load_policy
from tests.trainers.core.fsdp2_ranks import fsdp_on_processors
from tests.trainers.tiny_runs import on_policy, prompts, wanted_words


def run(policy: str, folder: Path, backend: str) -> dict:
    cls, args = on_policy(
        "rloo", folder, bf16=True, per_device_train_batch_size=2, max_steps=2, rollout=backend, beta=0.05
    )
    model = load_policy(policy, dtype="float32", sharded=True)
    trainer = cls(model, wanted_words, args, prompts(24), processing_class=toy.tokenizer())
    trainer.train()
    plugin = trainer.accelerator.state.fsdp_plugin
    found = {
        "engine": str(trainer.engine.engine.dtype),
        "computes": str(plugin.mixed_precision_policy.param_dtype),
        "logs": trainer.state.log_history,
    }
    trainer.close()
    return found


def main(policy: str, folder: Path, backends: list[str]) -> None:
    fsdp_on_processors()
    runs = {}
    for backend in backends:
        runs[backend] = run(policy, folder / backend, backend)
    torch.save(runs, folder / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
