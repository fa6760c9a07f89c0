"""SparsePO and MaPO with one global batch of 8 pairs, on one process or two. Run as a script: policy, folder."""

import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from peft import LoraConfig

from align.modeling.load import Reference
from align.modeling.token_masks import MaskSettings, TokenMasks
from align.trainers.masks.forward import MaskedForward
from tests.modeling import tiny
from tests.modeling.pair_batches import pairs
from tests.trainers.pairs.preference_runs import history, toy_pairs
from tests.trainers.sparse_runs import SparsePOTrainer, config
from tests.trainers.tiny_runs import parameters

NAMES = ("loss", "grad_norm", "kl/chosen", "mask_u_mean/chosen", "mask_u_sparsity/rejected", "eval_loss")
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
CASES = {
    "common": {"mask_dropout": 0.0, "mask_l1_kl": 0.01},
    "independent, LoRA": {"variant": "independent", "mask_dropout": 0.0},
    "mapo": {"variant": "mapo"},
}


def train(policy: str, folder: Path, world: int) -> dict[str, dict]:
    """What was logged and the final weights, masks among them, by case."""
    found = {}
    for name, options in CASES.items():
        args = config(
            folder / name.partition(",")[0],
            per_device_train_batch_size=4 // world,
            gradient_accumulation_steps=2,
            per_device_eval_batch_size=2,
            max_steps=4,
            eval_strategy="steps",
            eval_steps=2,
            **options,
        )
        lora = LoraConfig(**LORA) if "LoRA" in name else None
        trainer = SparsePOTrainer(policy, args, toy_pairs(24), toy_pairs(8, seed=1), peft_config=lora)
        trainer.train()
        found[name] = {"logs": history(trainer, *NAMES), "weights": parameters(trainer.model)}
    return found


def sharded_difference(rank: int) -> float:
    """The largest difference of any gradient, masks among them, between FSDP2 on two processes and one model that sees
    both batches. Trainers shard on accelerators only, so their forward pass is run without one here."""
    from torch.distributed.fsdp import fully_shard

    def make():
        model = tiny.causal()
        settings = MaskSettings("independent", hidden_size=16, num_layers=2)
        model.add_module("token_masks", TokenMasks(settings).double().initialise("unit", seed=0))
        return model

    def losses(model, batch):
        reference = Reference(tiny.causal(seed=1), adapter_off=False)
        masked = MaskedForward(reference, model.token_masks, nullcontext, layers="all")
        tokens = masked(model, model, batch, chunk_size=None)
        options = SimpleNamespace(beta=0.5, l1={"l1_u": 0.1})
        trainer = SimpleNamespace(args=options, _checked=lambda tokens: tokens)  # weights of the masks themselves
        return SparsePOTrainer.losses(trainer, *tokens, batch).losses

    alone, sharded, batches = make(), make(), [pairs(seed=0), pairs(seed=1)]
    for layer in sharded.model.layers:
        fully_shard(layer)
    fully_shard(sharded, reshard_after_forward=True)
    (sum(losses(alone, batch).sum() for batch in batches) / 2).backward()
    losses(sharded, batches[rank]).sum().backward()
    return max(
        (a.grad - b.grad.full_tensor()).abs().max().item()
        for a, b in zip(alone.parameters(), sharded.parameters(), strict=True)
    )


if __name__ == "__main__":
    found = train(sys.argv[1], Path(sys.argv[2]), 2)
    found["largest difference under FSDP2"] = sharded_difference(dist.get_rank())
    torch.save(found, Path(sys.argv[2]) / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()
