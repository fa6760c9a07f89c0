"""Reward models that leave the device to the policy while nothing is scored."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

HOST = torch.device("cpu")


class OnDevice(ABC):
    """Mixed into rewards that read models. They lie on `device`; once `offload` was called, in the host's memory, and
    on `device` only inside `working`."""

    device: torch.device
    offloaded = False

    @abstractmethod
    def models(self) -> list[nn.Module]:
        """What takes the device's memory."""

    def offload(self) -> None:
        self.offloaded = True
        self._move(HOST)

    @contextmanager
    def working(self) -> Iterator[None]:
        if not self.offloaded:
            yield
            return
        try:
            self._move(self.device)
            yield
        finally:
            self._move(HOST)

    def _move(self, device: torch.device) -> None:
        if self.device.type == "cpu":
            return
        for model in self.models():
            model.to(device)
        if device == HOST and self.device.type == "cuda":
            torch.cuda.empty_cache()  # for an engine in this process or another one
