"""Where vLLM keeps each weight, in a worker: learned from its own loader once, then used for every push and proof.

vLLM fuses projections, pads the vocabulary, shares embeddings and keeps slices of tensors (tensor parallelism), and its
`reload_weights` puts every layer back together for each push. Here the model's own `load_weights` runs once, on tensors
without data, while the copies that it would make are recorded: what comes from where. A push is then those copies.

On CPUs linear layers compute with a packed copy of their weight and keep no other. Their tensors are put together
beside the model, fingerprinted and packed; the fingerprint stays with the packed copy. That packing is right is seen by
multiplying with unit vectors, which gives columns of the weight exactly: for all layers at first, then for some.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

from align.errors import RolloutError
from align.rollout.identity import Fingerprints, bit_sums, fingerprint
from align.rollout.views import View

LOAD_FORMAT = "align_placed"
CHECKED_SHARE = 8  # after the first push, one of so many packed layers is multiplied with unit vectors
CHECKED_COLUMNS = 4


@dataclass(frozen=True)
class Part:
    """A part of a named tensor and where it lies in a parameter of the engine."""

    source: View
    module: Any  # of vLLM
    attribute: str
    target: View

    @property
    def parameter(self) -> Tensor:
        return getattr(self.module, self.attribute)


@dataclass
class Packed:
    """The weight of a linear layer whose own is gone: how it is put together, and what is packed now."""

    number: int
    shape: torch.Size
    dtype: torch.dtype
    parts: list[tuple[str, Part]] = field(default_factory=list)
    arrived: dict[str, list[Tensor]] = field(default_factory=dict)
    kernel: object = None
    fingerprints: list = field(default_factory=list)


class Placement:
    """Of one worker's model. `direct`: every weight is placed, and pushes can be copies; else `reason` says why not."""

    def __init__(self, model: Any, shapes: dict[str, tuple[int, ...]]):
        """On the fresh model, before vLLM processes its weights. shapes: of the checkpoint's tensors, by name."""
        sources = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        with _Copies() as copies:
            model.load_weights(iter(sources.items()))
        names = {storage(tensor): name for name, tensor in sources.items()}
        owners: dict[int, tuple[nn.Module, str]] = {}
        for module in model.modules():
            for attribute, parameter in module.named_parameters(recurse=False):
                owners.setdefault(storage(parameter), (module, attribute))
        self.reason: str | None = None
        self.parts: dict[str, list[Part]] = {name: [] for name in shapes}
        filled: dict[tuple, int] = {}
        for target, source in copies.made:
            name, owner = names.get(storage(source)), owners.get(storage(target))
            if owner is None:
                continue  # a buffer, or a tensor of the loader's own
            key = (id(owner[0]), owner[1])
            filled[key] = filled.get(key, 0) + target.numel()
            if name is not None and target.shape == source.shape:
                base = getattr(*owner).storage_offset()
                self.parts[name].append(Part(View.of(source), owner[0], owner[1], View.of(target, base)))
            else:
                self.reason = f"{type(model).__name__} changes weights as it loads them"
        for module, attribute in owners.values():
            padding = isinstance(module, VocabParallelEmbedding)
            if not padding and filled.get((id(module), attribute), 0) != getattr(module, attribute).numel():
                self.reason = f"{type(model).__name__} has weights that its checkpoint does not fill"
        self._outline = {(id(m), a): outline(getattr(m, a)) for m, a in owners.values()}
        self._shapes = {(id(m), a): getattr(m, a).shape for m, a in owners.values()}
        self.packed: dict[int, Packed] = {}
        self.repacked: list[Any] = []
        self._kernels: dict[int, tuple] = {}
        self.pushes = 0

    def after_processing(self, model: Any) -> None:
        """Once vLLM has processed the weights for its kernels: which are still there as they were loaded?"""
        for name, parts in self.parts.items():
            for part in parts:
                key = (id(part.module), part.attribute)
                if outline(part.parameter) == self._outline[key]:
                    continue
                if not (part.attribute == "weight" and "cpu_linear" in vars(part.module)):
                    self.reason = f"vLLM keeps {name} in a layout of its own"
                elif part.parameter.numel() == 0:
                    new = Packed(len(self.packed), self._shapes[key], part.parameter.dtype)
                    self.packed.setdefault(id(part.module), new).parts.append((name, part))
        heads = any(isinstance(module, ParallelLMHead) for module in model.modules())
        for module in model.modules():
            if "cpu_linear" not in vars(module) or id(module) in self.packed or module.weight.numel() == 0:
                continue
            if heads and isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead):
                module.cpu_linear = None  # only looked up, never multiplied with: its packed copy would be dead weight
            else:
                self.repacked.append(module)

    @property
    def direct(self) -> bool:
        return self.reason is None

    def _packed(self, part: Part) -> Packed | None:
        return self.packed.get(id(part.module)) if part.attribute == "weight" else None

    # ---- a push -----------------------------------------------------------------------------------------------------

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.begin()
        self.place(weights)
        self.end()

    def begin(self) -> None:
        for started in self.packed.values():
            started.arrived = {}  # of a push that was interrupted

    @torch.no_grad()
    def place(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Some of the tensors of a push; those of a fused layer may come in several calls."""
        for name, tensor in weights:
            for part in self.parts[name]:
                packed = self._packed(part)
                if packed is None:
                    part.target.take(part.parameter.data).copy_(part.source.take(tensor.contiguous()))
                else:
                    packed.arrived.setdefault(name, []).append(part.source.take(tensor.contiguous()))
                    if sum(map(len, packed.arrived.values())) == len(packed.parts):
                        self._pack(part.module, packed)

    @torch.no_grad()
    def end(self) -> None:
        for number, module in enumerate(self.repacked):
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)
            self._kernels[id(module)] = (module.cpu_linear, fingerprint(module.weight))
            self._multiply(module, module.weight, number)
        self.pushes += 1

    def _pack(self, module: Any, packed: Packed) -> None:
        arrived, packed.arrived = packed.arrived, {}
        pieces = [(part, arrived[name].pop(0)) for name, part in packed.parts]
        whole = pieces[0][1]
        if len(pieces) > 1 or whole.shape != packed.shape or whole.dtype != packed.dtype or not whole.is_contiguous():
            whole = torch.empty(packed.shape, dtype=packed.dtype)
            for part, piece in pieces:
                part.target.take(whole).copy_(piece)
        packed.fingerprints = [fingerprint(part.target.take(whole)) for part, _ in pieces]
        module.weight = nn.Parameter(whole, requires_grad=False)
        dispatch_cpu_unquantized_gemm(module, remove_weight=True)
        packed.kernel = module.cpu_linear
        self._multiply(module, whole, packed.number)

    def _multiply(self, module: Any, weight: Tensor, number: int) -> None:
        """The kernel's products with unit vectors are columns of the weight, to the last bit."""
        if self.pushes and (number + self.pushes) % CHECKED_SHARE:
            return
        columns = torch.randperm(weight.shape[1])[:CHECKED_COLUMNS]
        units = torch.zeros(len(columns), weight.shape[1], dtype=weight.dtype)
        units[torch.arange(len(columns)), columns] = 1
        if not torch.equal(module.cpu_linear(units, module.weight, None), weight[:, columns].t()):
            raise RolloutError(f"vLLM packed the weight of a {type(module).__name__} wrongly")

    # ---- a proof ----------------------------------------------------------------------------------------------------

    def pieces(self, name: str, tensor: Tensor) -> list[Tensor]:
        """The parts of the trainer's tensor that this worker keeps, as it holds them."""
        return [part.source.take(tensor.contiguous()).to(part.parameter.dtype) for part in self.parts[name]]

    def held(self, names: Iterable[str]) -> Fingerprints:
        """Fingerprints of what the kernels read of these tensors of the checkpoint."""
        for module in self.repacked:
            kernel, of = self._kernels.get(id(module), (None, None))
            if module.cpu_linear is not kernel or of != fingerprint(module.weight):
                raise RolloutError(f"the packed weight of vLLM's {type(module).__name__} is not that of the last push")
        return {name: [self._fingerprint(name, part) for part in self.parts[name]] for name in names}

    def _fingerprint(self, name: str, part: Part):
        packed = self._packed(part)
        if packed is None:
            return fingerprint(part.target.take(part.parameter.data))
        if packed.kernel is None or part.module.cpu_linear is not packed.kernel:
            return None  # what is multiplied with was not packed by us
        return packed.fingerprints[packed.parts.index((name, part))]


class _Copies(TorchDispatchMode):
    """Records copies out of tensors without data instead of making them."""

    def __init__(self):
        super().__init__()
        self.made: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default and args[1].is_meta and not args[0].is_meta:
            self.made.append((args[0], args[1]))
            return args[0]
        return func(*args, **(kwargs or {}))


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def outline(parameter: Tensor) -> tuple:
    """Tells whether a parameter was changed, but not from one dtype to another (vLLM widens biases on some CPUs)."""
    values = parameter.detach()
    on_cpu = values.device.type == "cpu"
    return tuple(values.shape), fingerprint(values.float()) if on_cpu else bit_sums(values.contiguous(), torch.float32)


@register_model_loader(LOAD_FORMAT)
class PlacedLoader(DummyModelLoader):
    """vLLM's loader of random weights; it also learns the placement. `model_loader_extra_config`: {"shapes": ...},
    or the path of a JSON file with them."""

    def __init__(self, load_config):
        extra, load_config.model_loader_extra_config = load_config.model_loader_extra_config, {}
        super().__init__(load_config)
        load_config.model_loader_extra_config = extra
        shapes = extra["shapes"]
        self._shapes = json.loads(Path(shapes).read_text()) if isinstance(shapes, str) else shapes

    def load_weights(self, model: nn.Module, model_config) -> None:
        super().load_weights(model, model_config)
        vars(model)["align_placement"] = Placement(model, self._shapes)
