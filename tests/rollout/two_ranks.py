"""Run by `torchrun --nproc_per_node=2`: one engine per rank beside the trainer's gloo group. Arguments: back-ends."""

import gc
import sys

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model

from align.rollout import SamplingParams, make_engine
from tests.rollout.rollout_models import is_greedy, llama, never_ending, prompts

GREEDY = SamplingParams(max_tokens=8, temperature=0)


def shard(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    for layer in core.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def with_adapter(model):
    torch.manual_seed(5)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=16, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def check(engine, model, reference, version):
    engine.push(model, version)
    ids = prompts([4, 20])
    for rollout in engine.generate(ids, GREEDY):
        assert is_greedy(reference, rollout.prompt_ids, rollout.completions[0].token_ids)


def main(backends: list[str]) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for backend in backends:
        engine = make_engine(never_ending(llama(rank)), backend=backend, max_model_len=256, seed=rank)
        check(engine, never_ending(llama(10 + rank)), never_ending(llama(10 + rank)), 1)
        check(engine, shard(never_ending(llama(1))), never_ending(llama(1)), 2)
        check(engine, shard(with_adapter(never_ending(llama(2)))), with_adapter(never_ending(llama(2))), 3)
        engine.close()
        total = torch.tensor([1.0 + rank])
        dist.all_reduce(total)
        assert total.item() == 3
        engine = make_engine(shard(never_ending(llama(3))), backend=backend, max_model_len=256, seed=rank)
        del engine  # not closed: what it leaves to the garbage collector must not touch the group either
        gc.collect()
        dist.all_reduce(total)
        sys.stdout.write(f"{backend} done\n")
        sys.stdout.flush()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
