"""Tensors of a push in one block of bytes, for what moves blocks and not files; used by trainers and by workers."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

BLOCK = 1 << 28  # bytes at a time, unless one tensor is larger
ALIGNED = 16  # bytes, for views of any dtype
Outline = list[list]  # of each tensor in a block: its name, dtype, shape and first byte
Named = tuple[str, Tensor]


def packs(weights: Iterable[Named], limit: int) -> Iterator[list[Named]]:
    """`weights` in groups of at most `limit` bytes, unless one tensor is larger."""
    held: list[Named] = []
    size = 0
    for name, tensor in weights:
        if held and size + room(tensor) > limit:
            yield held
            held, size = [], 0
        held.append((name, tensor))
        size += room(tensor)
    if held:
        yield held


def room(tensor: Tensor) -> int:
    """Bytes that a tensor takes in a block."""
    return -(-tensor.nbytes // ALIGNED) * ALIGNED


class Block:
    """Memory on `device` that is written anew for every pack, and is only made anew for a larger one."""

    def __init__(self, device: torch.device | str, size: int = BLOCK):
        self.device, self.size = device, size
        self.bytes: Tensor | None = None

    def take(self, size: int) -> Tensor:
        """uint8 [size], uninitialised."""
        if self.bytes is None or self.bytes.numel() < size:
            self.bytes = None  # freed first
            self.bytes = torch.empty(max(size, self.size), dtype=torch.uint8, device=self.device)
        return self.bytes[:size]

    def pack(self, tensors: list[Named]) -> tuple[Tensor, Outline]:
        """The tensors' bytes behind each other, and where each begins."""
        block, outline, start = self.take(sum(room(tensor) for _, tensor in tensors)), [], 0
        for name, tensor in tensors:
            flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
            block[start : start + flat.numel()].copy_(flat)
            outline.append([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), start])
            start += room(tensor)
        return block, outline


def unpack(block: Tensor, outline: Outline) -> Iterator[Named]:
    """Views into a block that `Block.pack` wrote."""
    for name, kind, shape, start in outline:
        dtype = getattr(torch, kind)
        size = dtype.itemsize * torch.Size(shape).numel()
        yield name, block[start : start + size].view(dtype).view(shape)
