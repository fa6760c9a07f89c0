"""The second process of a machine under `configs/accelerate/fsdp2.yaml`, alone. Run as a script: a policy's folder, and
a folder for what it saves."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model

from align.distributed.shells import is_shell
from align.modeling.load import freeze_copy, load_backbone, load_policy, load_sequence_classifier
from align.trainers.on_policy.critic import make_critic
from align.trainers.pairs.reference import load_reference
from align.trainers.ppo import PPOConfig


def shells(model) -> float:
    """The share of the parameters, by size, that take no memory."""
    sizes = [(p.numel(), is_shell(p)) for p in model.parameters()]
    return sum(size for size, empty in sizes if empty) / sum(size for size, _ in sizes)


def what_fsdp_shards_takes_no_memory(saved: str, folder: str) -> None:
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = resident("VmRSS")
    policy = load_policy(saved, sharded=True)
    reference, halved = freeze_copy(policy), freeze_copy(policy, torch.bfloat16)
    named = load_reference(saved, policy)
    critic = make_critic(policy, PPOConfig(folder, report_to="none"), heads=1)
    assert resident("VmHWM") - before < 0.5 * 4 * 50e6  # all five together, of 200 MB each
    for model in (policy, reference, halved, named, critic.backbone, load_backbone(saved, sharded=True)):
        assert shells(model) > 0.999
    assert next(halved.parameters()).dtype == torch.bfloat16 and not any(
        p.requires_grad for p in reference.parameters()
    )
    assert all(p.requires_grad for p in policy.parameters())
    assert policy(torch.tensor([[1, 2]])).logits.shape == (1, 2, 64)  # checks that all processes make can run
    classifier = load_sequence_classifier(saved, sharded=True, head_seed=3)
    assert shells(classifier) > 0.999 and classifier.score.weight.std() > 0
    whole = load_policy(saved)  # for what is not sharded, such as a reward
    assert shells(whole) == 0 and whole.lm_head.weight.std() > 0


def an_adapter_is_merged_and_added_to_what_has_no_memory(saved: str, folder: str) -> None:
    adapted = get_peft_model(load_policy(saved, sharded=True), LoraConfig(r=4, target_modules="all-linear"))
    assert shells(adapted) > 0.9
    adapted.save_pretrained(folder)
    merged = load_policy(folder, sharded=True)
    assert merged.lm_head.weight.shape == (64, 512)


def resident(name: str) -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    os.environ |= {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
        "LOCAL_RANK": "1",
    }
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}/store", rank=0, world_size=1)
    what_fsdp_shards_takes_no_memory(*sys.argv[1:])
    an_adapter_is_merged_and_added_to_what_has_no_memory(*sys.argv[1:])
    dist.destroy_process_group()
