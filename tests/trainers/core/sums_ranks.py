"""The gradient of DPO on 128 pairs, before it is clipped, summed in many ways. Run as a script on two processes: folder
of policy and reference, folder of results."""

import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from align.data import toy
from align.distributed.shards import whole
from align.trainers.dpo import DPOTrainer
from tests.trainers.accelerate_setups import under
from tests.trainers.pairs.preference_runs import dpo_config, toy_pairs
from tests.trainers.tiny_runs import tiny_model

EACH = 64  # micro-batches of a process
LOGGED = ("loss", "logps/chosen", "logps/rejected", "rewards/margins", "rewards/chosen")
NAMES = ("here", "accelerate")
AS_ACCELERATE = {"accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": False}}}


class Gradient(TrainerCallback):
    def on_substep_end(self, args, state, control, model=None, **kwargs):
        """FSDP2 has none for its shards while it keeps the whole gradients."""
        self.in_shards = all(isinstance(p.grad, DTensor) for p in model.parameters())

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.parts = {name: whole(p.grad) for name, p in model.named_parameters()}


def models(folder: Path) -> None:
    """Weights that bfloat16 holds exactly, so that the runs differ in what they compute alone."""
    policy, reference = (tiny_model(toy.tokenizer(), num_hidden_layers=1) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    for parameter in reference.parameters():
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)
    policy.bfloat16().float().save_pretrained(folder / "policy")
    reference.bfloat16().float().save_pretrained(folder / "reference")


def gradient(
    folder: Path, output: Path, *, size: int, accumulation: int, own_sums=False, rounded=False, **options
) -> Gradient:
    """size: pairs of a micro-batch. own_sums: accelerate's, without what a trainer changes in them. rounded: policy and
    reference hold their weights in bfloat16."""
    kept = Gradient()
    cut = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "max_steps": 1}
    args = dpo_config(output, **cut, max_grad_norm=0.0, **(AS_ACCELERATE if own_sums else {}), **options)
    policy, reference = (str(folder / name) for name in ("policy", "reference"))
    trainer = DPOTrainer(
        policy, args, toy_pairs(2 * EACH), ref_model=reference, processing_class=toy.tokenizer(), callbacks=[kept]
    )
    if own_sums:
        plugin = trainer.accelerator.state.fsdp_plugin
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, reduce_dtype=torch.bfloat16)
    for model in (trainer.model, trainer.ref_model) if rounded else ():
        for parameter in model.parameters():  # and no buffers: rotary frequencies are float32 in every run
            parameter.data = parameter.data.bfloat16()
    trainer.train()
    kept.log = {name: trainer.state.log_history[0][name] for name in LOGGED}
    return kept


if __name__ == "__main__":
    folder, output = Path(sys.argv[1]), Path(sys.argv[2])
    dist.init_process_group("gloo")
    with under("fsdp2"):
        cut = {"size": 1, "accumulation": EACH, "bf16": True}
        runs = {name: gradient(folder, output / name, **cut, own_sums=name == "accelerate") for name in NAMES}
    found = {name: (run.parts, run.in_shards, run.log) for name, run in runs.items()}
    torch.save(found, output / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()
