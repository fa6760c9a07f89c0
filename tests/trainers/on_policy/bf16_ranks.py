"""Run by `torchrun --nproc_per_node=2`: on-policy steps with FSDP2 in bfloat16, as `align launch --setup fsdp2` has it.

Arguments: the folder of a policy, a folder for results, back-ends. Writes what was logged, by back-end.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from align.data import toy
from align.distributed.shards import reshard, whole
from align.modeling.load import load_policy
from tests.trainers.core.fsdp2_ranks import fsdp_on_processors
from tests.trainers.tiny_runs import on_policy, prompts, wanted_words


def rounded(trainer) -> list[str]:
    """Names of tensors that an engine in float32 gets rounded after a pass without gradients, as evaluations make."""
    with torch.no_grad():
        trainer.model(input_ids=torch.tensor([[3, 4, 5]]))
    trainer.engine.forget()
    trainer.sync_engine()
    reshard(trainer.model)
    held = trainer.engine.engine._tensors
    return [name for name, p in trainer.model.named_parameters() if not torch.equal(held[name], whole(p))]


def run(policy: str, folder: Path, backend: str) -> dict:
    rollout = {"backend": "transformers", "dtype": "float32"} if backend == "float32" else backend
    cls, args = on_policy(
        "rloo", folder, bf16=True, per_device_train_batch_size=2, max_steps=2, rollout=rollout, beta=0.05
    )
    model = load_policy(policy, dtype="float32", sharded=True)
    trainer = cls(model, wanted_words, args, prompts(24), processing_class=toy.tokenizer())
    trainer.train()
    after_a_pass = rounded(trainer) if rollout != backend else None
    plugin = trainer.accelerator.state.fsdp_plugin
    found = {
        "engine": str(trainer.engine.engine.dtype),
        "computes": str(plugin.mixed_precision_policy.param_dtype),
        "logs": trainer.state.log_history,
        "rounded": after_a_pass,
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
