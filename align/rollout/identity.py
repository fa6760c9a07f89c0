"""The proof that an engine holds the trainer's weights: fingerprints of every tensor, as the trainer cast it and as it
lies in the engine's own memory."""

import ctypes
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import xxhash
from torch import Tensor

from align.errors import RolloutError

Fingerprint = bytes | tuple | str  # str: of `texts`
Fingerprints = dict[str, list[Fingerprint]]  # by the tensor's name, one for each part of it that the engine keeps


WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
SUMMED = 1 << 24  # numbers at a time: torch widens all that it sums to 64 bits, of one embedding gigabytes


def fingerprint(tensor: Tensor, sums: bool | None = None) -> Fingerprint:
    """Equal for tensors that are equal bit by bit, and for no others (by chance: 2^-64). All of the tensor is read.

    On CPUs a hash of its bytes (a tenth of a second per GB). On GPUs, which would have to send them to the CPU first,
    exact integer sums of its bits over each of two dimensions. sums: as on a GPU (True) or on a CPU (False), wherever
    the tensor lies, to compare it with one on the other.
    """
    tensor = tensor.detach().contiguous()
    head = (tuple(tensor.shape), str(tensor.dtype))
    if sums is None:
        sums = tensor.device.type != "cpu"
    if not sums:
        tensor = tensor.cpu()
        return xxhash.xxh3_128(memory(tensor)).digest() + repr(head).encode()
    return (head, *bit_sums(tensor))


def texts(fingerprints: Fingerprints) -> Fingerprints:
    """As JSON can hold them, equal where they were equal."""
    return {name: [repr(one) for one in each] for name, each in fingerprints.items()}


def bit_sums(tensor: Tensor, dtype: torch.dtype | None = None) -> tuple[bytes, bytes]:
    """Hashes of the sums of a contiguous tensor's bits, read as integers, over rows and over columns. dtype: of what
    the tensor is cast to first."""
    table = tensor.reshape(-1, tensor.shape[-1] if tensor.dim() else 1)
    rows: list[Tensor] = []
    columns = torch.zeros(table.shape[1], dtype=torch.int64, device=table.device)
    for block in table.split(max(1, SUMMED // max(1, table.shape[1]))):
        block = block.to(dtype or block.dtype)
        words = block.view(WORDS[block.element_size()])
        rows.append(words.sum(1, dtype=torch.int64))
        columns += words.sum(0, dtype=torch.int64)
    found = (torch.cat(rows).cpu(), columns.cpu())
    return xxhash.xxh3_64(memory(found[0])).digest(), xxhash.xxh3_64(memory(found[1])).digest()


def memory(tensor: Tensor) -> Any:
    """The bytes of a contiguous tensor on a CPU, not copied: valid as long as it lives. Not by `numpy`, which would fix
    the size of a storage that FSDP2 gives back by resizing it."""
    return (ctypes.c_char * (tensor.numel() * tensor.element_size())).from_address(tensor.data_ptr())


class WeightStream:
    """The trainer's tensors on their way into an engine, each fingerprinted as it passes.

    parts(name, tensor): the pieces of a tensor that the engine keeps, as it will hold them. sums: of `fingerprint`.
    """

    def __init__(
        self,
        weights: Iterable[tuple[str, Tensor]],
        parts: Callable[[str, Tensor], list[Tensor]],
        sums: bool | None = None,
    ):
        self._weights, self._parts, self._sums = iter(weights), parts, sums
        self.fingerprints: Fingerprints = {}

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._weights:
            self.fingerprints[name] = [fingerprint(part, self._sums) for part in self._parts(name, tensor)]
            yield name, tensor

    def finish(self) -> Fingerprints:
        """Those of all tensors, whether the engine took them or not. Sharded ones are gathered by all ranks alike."""
        for _ in self:
            pass
        return self.fingerprints


def check_identity(sent: Fingerprints, held: Fingerprints, engine: str, version: int) -> None:
    """Raises `RolloutError` unless the engine holds what the trainer has, all of it."""
    wrong = [name for name in sent if name in held and held[name] != sent[name]]
    absent = [name for name in sent if name not in held]
    unknown = [name for name in held if name not in sent]
    if not wrong and not absent and not unknown:
        return
    found = "; ".join(
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in (("differ", wrong), ("are missing there", absent), ("are not the trainer's", unknown))
        if names
    )
    raise RolloutError(
        f"the {engine} engine does not hold the trainer's weights (it counts version {version}): of {len(sent)} "
        f"tensors {found}. A push was missed, or it arrived in part"
    )
