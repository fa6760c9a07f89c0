"""A name for the weights that a run starts from, or measures itself by."""

import hashlib

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from align.distributed.shards import is_zero3, whole
from align.modeling.adapters import PREFIX

SAMPLES = 64


def weights_digest(model: nn.Module, *, adapters: bool = False) -> str:
    """Of names, shapes and samples of the weights, before FSDP shards them. adapters: those of adapters too, which a
    run that trains them draws itself. All processes must call it together."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        if not adapters and ("lora_" in name or "modules_to_save" in name):
            continue
        name = name.removeprefix(PREFIX).replace(".base_layer", "")
        value = whole(parameter) if is_zero3([parameter]) else parameter
        digest.update(f"{name} {tuple(value.shape)};".encode())
        digest.update(_samples(value))
    return digest.hexdigest()


def _samples(value: Tensor) -> bytes:
    if isinstance(value, DTensor) or value.is_meta or not value.numel():
        return b""
    flat = value.detach().flatten()
    return flat[:: max(len(flat) // SAMPLES, 1)][:SAMPLES].to("cpu", torch.float64).numpy().tobytes()
