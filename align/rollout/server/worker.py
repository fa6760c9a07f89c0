"""What runs inside a server's workers: weights taken from files, and fingerprints of what the kernels read."""

from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from align.errors import RolloutError
from align.rollout.identity import Fingerprints, texts
from align.rollout.server.plugin import register
from align.rollout.vllm_cpu import draw_by_row
from align.rollout.vllm_engine import placement_of
from align.rollout.vllm_lora import AdapterSlot
from align.rollout.vllm_weights import Placement

register()  # where the package was installed without its entry points


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Nothing has to be agreed on."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """file: a safetensors file that this worker can read, with some of the tensors of a push."""

    file: str


class FileTransferEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Takes weights from files, on a RAM disk or another folder that trainer and server share, to where they lie."""

    init_info_cls, update_info_cls = InitInfo, UpdateInfo
    supports_draft_weight_update = False

    def __init__(self, config, vllm_config, device, model):
        super().__init__(config, vllm_config, device, model)
        if "align_placement" not in vars(model):
            raise RolloutError("weights can be pushed to servers that were started by `align serve` only")
        self.placement: Placement = placement_of(model)

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        self.placement.begin()

    def receive_weights(self, update_info: UpdateInfo) -> None:
        self.placement.place(load_file(update_info.file, device=str(self.device)).items())

    def finish_weight_update(self) -> None:
        self.placement.end()

    def shutdown(self) -> None:
        pass


class WorkerExtension:
    """Further methods of vLLM's worker, called through `/collective_rpc`: they return what JSON can hold."""

    weight_transfer_engine: FileTransferEngine
    model_runner: Any
    parallel_config: Any

    def align_describe(self) -> dict:
        """What a trainer has to know of this worker. parts: of each tensor, [size, stride, offset, dtype] of what is
        kept here; reason: why weights cannot be pushed, or None; adapters: the layers that can have one; dtype: of the
        arithmetic, in which a few weights may be kept wider; device: "cpu" or "cuda"."""
        placement = self.weight_transfer_engine.placement
        if self.model_runner.device.type == "cpu":
            draw_by_row(self)
        parts = {
            name: [[*vars(part.source).values(), str(part.parameter.dtype).removeprefix("torch.")] for part in found]
            for name, found in placement.parts.items()
        }
        # with tensor parallelism each worker has a slice of an adapter, and could not prove it
        lora = self.model_runner.lora_config is not None and self.parallel_config.tensor_parallel_size == 1
        return {
            "reason": placement.reason,
            "parts": parts,
            "adapters": AdapterSlot(self).layers if lora else [],
            "max_num_seqs": self.model_runner.max_num_reqs,
            "dtype": str(self.model_runner.model_config.dtype).removeprefix("torch."),
            "device": self.model_runner.device.type,
        }

    def align_fingerprints(self, names: list[str], adapter: dict[str, list[int]]) -> Fingerprints:
        """Of these tensors, as the kernels read them. adapter: shapes of the matrices of the adapter, by name."""
        held = self.weight_transfer_engine.placement.held(names)
        if adapter:
            slot = AdapterSlot(self)
            slot.take_over()
            held |= slot.fingerprints({name: torch.Size(shape) for name, shape in adapter.items()})
        return texts(held)
