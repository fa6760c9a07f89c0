"""Operations over the processes of a run, on tensors of rows."""

import torch
from accelerate import Accelerator
from torch import Tensor

from align.objectives.returns import whiten


class Ranks:
    """The processes of a run (`accelerator`), or this one alone (None). All processes must make the same calls."""

    def __init__(self, accelerator: Accelerator | None = None):
        self.accelerator = accelerator
        self.count = 1 if accelerator is None else accelerator.num_processes
        self.index = 0 if accelerator is None else accelerator.process_index

    @property
    def sharded(self) -> bool:
        """Whether no process holds whole gradients."""
        kind = None if self.accelerator is None else str(self.accelerator.distributed_type).rpartition(".")[2]
        return kind in ("FSDP", "DEEPSPEED")

    def gather(self, values: Tensor) -> Tensor:
        """The rows of all processes, this one's at `local_slice(N)`, on the CPU. values: [N, ...], N the same
        everywhere; a second dimension of other lengths is padded with 0."""
        if self.accelerator is None or self.count == 1:
            return values
        if values.dim() > 1:
            values = self.accelerator.pad_across_processes(values, dim=1)
        return self.accelerator.gather(values.to(self.accelerator.device)).cpu()

    def local_slice(self, count: int) -> slice:
        """Where the `count` rows of this process are among the gathered ones."""
        return slice(self.index * count, (self.index + 1) * count)

    def whiten(self, values: Tensor, mask: Tensor) -> Tensor:
        """Mean 0 and deviation 1 over the tokens of all processes, 0 outside the mask, and everywhere if it has one
        token or none, because all samples are left out. values, mask: [N, L]."""
        values_of_all, mask_of_all = self.gather(values), self.gather(mask)
        if int(mask_of_all.bool().sum()) <= 1:
            return torch.zeros_like(values)
        whitened = whiten(values_of_all, mask_of_all)
        return whitened[self.local_slice(len(values)), : values.shape[1]]

    def total(self, count: int) -> Tensor:
        """The sum over all processes of a number, on the device."""
        if self.accelerator is None:
            return torch.tensor(count)
        return self.accelerator.gather(torch.tensor([count], device=self.accelerator.device)).sum()

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, element by element. values: the same shape everywhere."""
        return values if self.accelerator is None else self.accelerator.reduce(values, reduction="sum")
