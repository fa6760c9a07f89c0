"""A block of GPU memory that another process on the same GPU reads where it lies (CUDA IPC)."""

import base64

import torch
from torch import Tensor

from align.errors import RolloutError

BYTES = (1, 4, 6)  # of what torch says of a storage, these are bytes


def gpu_of(device: torch.device) -> str | None:
    """The GPU's own number, whatever a process calls it; None for a CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None


def exported(block: Tensor) -> list:
    """What `imported` needs, as JSON can hold it: for one process, once. The block has to outlive what that makes."""
    parts = list(block.untyped_storage()._share_cuda_())
    if [i for i, part in enumerate(parts) if isinstance(part, bytes)] != list(BYTES):
        raise RolloutError(
            f"torch {torch.__version__} describes shared GPU memory in a form of its own, which is not known here: "
            "set rollout.transfer: files"
        )
    return [base64.b64encode(part).decode() if i in BYTES else part for i, part in enumerate(parts)]


def imported(handle: list, device: torch.device) -> Tensor:
    """uint8, the other process's memory. Raises `RolloutError` where the two do not share a GPU."""
    parts = [base64.b64decode(part) if i in BYTES else part for i, part in enumerate(handle)]
    try:
        storage = torch.UntypedStorage._new_shared_cuda(device.index or 0, *parts[1:])
    except RuntimeError as error:
        raise RolloutError(
            f"the trainer's GPU memory cannot be read here ({error}): set rollout.transfer: files"
        ) from error
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
