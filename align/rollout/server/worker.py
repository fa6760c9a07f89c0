"""What runs inside a server's workers: weights received, and fingerprints of what the kernels read."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from safetensors.torch import load_file
from torch.distributed import TCPStore
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from align.errors import RolloutError
from align.rollout.identity import Fingerprints, texts
from align.rollout.server.group import Group, own_address
from align.rollout.server.packing import Block, Outline, unpack
from align.rollout.server.plugin import register
from align.rollout.server.same_gpu import gpu_of, imported
from align.rollout.vllm_cpu import draw_by_row
from align.rollout.vllm_engine import placement_of
from align.rollout.vllm_lora import AdapterSlot
from align.rollout.vllm_weights import Placement

register()  # where the package was installed without its entry points


@dataclass
class InitInfo(WeightTransferInitInfo):
    """The group of a trainer and all workers of its servers. host, port: where it meets. first_rank: of this server's
    workers; size: of the group. backend, seconds: of `Group`."""

    host: str
    port: int
    first_rank: int
    size: int
    backend: str
    seconds: float


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """Some of the tensors of a push, in a safetensors `file` that this worker can read, or in a block: in memory of the
    trainer (`handle`, of `exported`), or else broadcast to the group. outline: of the block; size: its bytes."""

    file: str | None = None
    handle: list | None = None
    outline: Outline = field(default_factory=list)
    size: int = 0


class Receiver(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Takes the weights of a push, however they come, to where they lie."""

    init_info_cls, update_info_cls = InitInfo, UpdateInfo
    _handle: list | None
    _memory: torch.Tensor | None
    supports_draft_weight_update = False

    def __init__(self, config, vllm_config, device, model):
        super().__init__(config, vllm_config, device, model)
        if "align_placement" not in vars(model):
            raise RolloutError("weights can be pushed to servers that were started by `align serve` only")
        self.placement: Placement = placement_of(model)
        self.group: Group | None = None
        self._forget()
        self.label = ""  # of the weights, for the trainer; vLLM 0.26 keeps none

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        self.leave()
        parallel = self.parallel_config
        rank = init_info.first_rank + parallel.data_parallel_index * parallel.world_size + parallel.rank
        limit = timedelta(seconds=init_info.seconds)
        store = TCPStore(init_info.host, init_info.port, is_master=False, timeout=limit)
        address = own_address(init_info.host)
        self.group = Group(init_info.backend, store, rank, init_info.size, init_info.seconds, address)
        self.block = Block("cpu" if init_info.backend == "gloo" else self.device)

    def start_weight_update(self) -> None:
        self.placement.begin()
        self._forget()

    def receive_weights(self, update_info: UpdateInfo) -> None:
        self.placement.place(self._tensors(update_info))

    def _tensors(self, info: UpdateInfo) -> Iterable[tuple[str, torch.Tensor]]:
        if info.file is not None:
            return load_file(info.file, device=str(self.device)).items()
        if info.handle is not None:
            if info.handle != self._handle or self._memory is None:
                self._forget()  # the old one first
                self._handle, self._memory = info.handle, imported(info.handle, self.device)
            return unpack(self._memory, info.outline)
        if self.group is None:
            raise RolloutError("no group was formed through which weights could be broadcast")
        block = self.block.take(info.size)
        self.group.broadcast(block)
        return unpack(block.to(self.device, copy=True), info.outline)  # layers on CPUs keep views until they are whole

    def finish_weight_update(self) -> None:
        self.placement.end()
        self._forget()

    def _forget(self) -> None:
        """The trainer's memory, which it frees after a push."""
        self._handle = self._memory = None

    def leave(self) -> None:
        if self.group is not None:
            self.group.close()
            self.group = None

    def shutdown(self) -> None:
        self.leave()

    @staticmethod
    def trainer_send_weights(iterator, trainer_args) -> None:
        """For trainers of vLLM 0.26, which this transfer has none of: `align.rollout.server.transfer` sends."""
        raise RolloutError("only a run of align (rollout.backend: server) sends weights to `align serve`")


class WorkerExtension:
    """Further methods of vLLM's worker, called through `/collective_rpc`: they return what JSON can hold."""

    weight_transfer_engine: Receiver
    model_runner: Any
    parallel_config: Any

    def align_describe(self) -> dict:
        """What a trainer has to know of this worker. parts: of each tensor, [size, stride, offset, dtype] of what is
        kept here; reason: why weights cannot be pushed, or None; adapters: the layers that can have one; dtype: of the
        arithmetic, in which a few weights may be kept wider; device: "cpu" or "cuda"; config: the model's, as vLLM has
        it."""
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
            "gpu": gpu_of(self.model_runner.device),
            "config": json.loads(self.model_runner.model_config.hf_text_config.to_json_string(use_diff=False)),
        }

    def align_label(self, new: str | None = None) -> str:
        """Of the weights, as the trainer calls them; `new`: from now on. Empty until a trainer has named them."""
        if new is not None:
            self.weight_transfer_engine.label = new
        return self.weight_transfer_engine.label

    def align_fingerprints(self, names: list[str], adapter: dict[str, list[int]]) -> Fingerprints:
        """Of these tensors, as the kernels read them. adapter: shapes of the matrices of the adapter, by name."""
        held = self.weight_transfer_engine.placement.held(names)
        if adapter:
            slot = AdapterSlot(self)
            slot.take_over()
            held |= slot.fingerprints({name: torch.Size(shape) for name, shape in adapter.items()})
        return texts(held)
