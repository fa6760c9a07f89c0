"""One LoRA adapter in a vLLM worker: installed in memory, read back from where its kernels read."""

import torch
from torch import Tensor
from vllm.config.lora import MaxLoRARanks
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest

from align.modeling.adapters import PREFIX
from align.rollout.adapters import A, B
from align.rollout.identity import Fingerprints, fingerprint


def rank_for(rank: int) -> int:
    """The smallest rank that vLLM can be set to which holds this one."""
    return min(allowed for allowed in MaxLoRARanks.__args__ if allowed >= rank)


def lora_options(rank: int) -> dict:
    """For `vllm.LLM`: room for one adapter."""
    return {"enable_lora": True, "max_lora_rank": rank_for(rank), "max_loras": 1, "max_cpu_loras": 1}


class AdapterSlot:
    """Of one worker. An adapter gets a new id with every version: vLLM would take the old one for the same id."""

    def __init__(self, worker):
        self._worker = worker
        self._manager = worker.model_runner.lora_manager
        self._layers = self._manager._adapter_manager.modules
        packed = self._manager._adapter_manager.packed_modules
        # Layers of the checkpoint by name: vLLM's layer, and the place in it if several are fused.
        self._places = {
            part: (name, place) for name in self._layers for place, part in enumerate(packed.get(name, [name]))
        }
        self.adapter_id = 0

    @property
    def layers(self) -> list[str]:
        """Of the checkpoint, those that vLLM can adapt."""
        return list(self._places)

    def missing(self, names: list[str]) -> list[str]:
        """The layers among these that vLLM cannot adapt."""
        return [name for name in names if name not in self._places]

    def install(self, tensors: dict[str, Tensor]) -> None:
        """tensors: of `adapter_weights`."""
        for held in self._manager.list_adapters():
            self._manager.remove_adapter(held)
        self.adapter_id += 1
        manager = self._manager._adapter_manager
        named = {f"{PREFIX}{name}.weight": tensor for name, tensor in tensors.items()}
        rank = max(tensor.shape[0] for name, tensor in tensors.items() if name.endswith(A))
        adapter = LoRAModel.from_lora_tensors(
            self.adapter_id,
            named,
            PEFTHelper(r=rank, lora_alpha=rank, target_modules=[]),  # scaled already
            device=str(self._worker.device),
            dtype=self._manager.lora_config.lora_dtype,
        )
        manager.add_adapter(adapter)
        manager.activate_adapter(self.adapter_id)

    def take_over(self) -> None:
        """Hold the one adapter that vLLM was told to load from a folder."""
        (self.adapter_id,) = [one for one in self._manager._adapter_manager.lora_index_to_id if one is not None]

    def request(self) -> LoRARequest:
        """What a request for completions names the adapter by. The path is not read: it is there already."""
        return LoRARequest(f"version {self.adapter_id}", self.adapter_id, "in memory")

    def held(self, name: str, tensor_shape: torch.Size) -> Tensor:
        """What the kernels read of `<layer>.lora_A` or `.lora_B`."""
        slot = self._manager._adapter_manager.lora_index_to_id.index(self.adapter_id)
        layer, place = self._places[name.removesuffix(A).removesuffix(B)]
        stacked = self._layers[layer].lora_a_stacked if name.endswith(A) else self._layers[layer].lora_b_stacked
        rows, columns = tensor_shape
        return stacked[place][slot, 0, :rows, :columns]

    def fingerprints(self, shapes: dict[str, torch.Size]) -> Fingerprints:
        return {name: [fingerprint(self.held(name, shape))] for name, shape in shapes.items()}
