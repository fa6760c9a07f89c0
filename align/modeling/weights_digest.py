"""A name for the weights that a run starts from, or measures itself by."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from align.distributed.shards import is_zero3, whole
from align.modeling.adapters import PREFIX, WEIGHTS_FILE, adapter_base, folder_digest, is_adapter

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


def named_digest(model: str) -> str | None:
    """Without loading them: of a folder's weight files, and an adapter's base; None for a hub name."""
    if not is_adapter(model):
        return folder_digest(model)
    path = Path(model) / WEIGHTS_FILE
    own = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest() if path.exists() else None
    return f"{own} on {named_digest(adapter_base(model))}"


def _samples(value: Tensor) -> bytes:
    if isinstance(value, DTensor) or value.is_meta or not value.numel():
        return b""
    flat = value.detach().flatten()
    return flat[:: max(len(flat) // SAMPLES, 1)][:SAMPLES].to("cpu", torch.float64).numpy().tobytes()
