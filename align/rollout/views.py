"""Strided parts of tensors, as data: what of a checkpoint's tensor an engine keeps, and where."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class View:
    """A strided part of a tensor, counted in elements."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: Tensor, base: int = 0) -> "View":
        return cls(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()) - base)

    def take(self, tensor: Tensor) -> Tensor:
        return tensor.as_strided(self.size, self.stride, tensor.storage_offset() + self.offset)
