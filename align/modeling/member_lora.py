"""One LoRA adapter and head per member on one frozen model, all applied in one forward pass.

The adapters are PEFT's in meaning and on disk (`save_adapter` writes what `peft` reads). PEFT applies one at a time;
here the rows are multiplied at the first adapted layer, B rows become K * B, and member k's matrices act on part k.
"""

import copy
import math
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from align.distributed.disk import open_to_others
from align.errors import ConfigError
from align.modeling.adapters import PREFIX, WEIGHTS_FILE, adding_lora, by_names, named_base
from align.modeling.members import Members, draw_heads, layer_list, modules_after
from align.modeling.types import Model

# What a LoraConfig may set here: which layers, and sizes. The rest changes the arithmetic or trains other weights.
SUPPORTED = {
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
    *(
        "base_model_name_or_path",
        "revision",
        "task_type",
        "inference_mode",
        "peft_type",
        "peft_version",
        "auto_mapping",
    ),
}


class MemberLora(nn.Module):
    """W x + scaling * B_k A_k x for the k-th of K equal parts of the rows (Hu et al. 2021, eq. 3).

    lora_A: [K, r, in], as PEFT draws them (Kaiming uniform), each with its seed. lora_B: [K, out, r], 0.
    """

    def __init__(
        self, base: nn.Module, seeds: list[int], *, features: tuple[int, int], r: int, scaling: float, dropout: float
    ):
        super().__init__()
        self.base, self.scaling, self.dropout = base, scaling, nn.Dropout(dropout)
        inputs, outputs = features
        device = base.get_parameter("weight").device
        bound = math.sqrt(1 / inputs)
        drawn = [(torch.rand(r, inputs, generator=torch.Generator().manual_seed(s)) * 2 - 1) * bound for s in seeds]
        self.lora_A = nn.Parameter(torch.stack(drawn).to(device))
        self.lora_B = nn.Parameter(torch.zeros(len(seeds), outputs, r, device=device))

    def forward(self, x: Tensor) -> Tensor:
        out = self.base(x)
        count, dtype = len(self.lora_A), self.lora_A.dtype
        low = torch.bmm(self.dropout(x).reshape(count, -1, x.shape[-1]).to(dtype), self.lora_A.mT)
        rows = out.reshape(count, -1, out.shape[-1]).to(dtype)
        in_place = not torch.is_grad_enabled() and low.dtype == dtype  # not under autocast; `out` is nobody else's
        add = torch.Tensor.baddbmm_ if in_place else torch.baddbmm
        return add(rows, low, self.lora_B.mT, alpha=self.scaling).view(out.shape).to(out.dtype)


class _Rows:
    """Multiplies what the layers get besides their hidden states (masks, positions), once per forward pass."""

    def __init__(self, count: int):
        self.count = count
        self.known: dict[Any, Any] = {}

    def __call__(self, layer, args, kwargs, first: bool):
        hidden, *rest = args
        if first:
            self.known.clear()
            batch, hidden = len(hidden), hidden.repeat(self.count, *[1] * (hidden.dim() - 1))
        else:
            batch = len(hidden) // self.count
        repeat = partial(self._repeat, batch=batch)
        return (hidden, *map(repeat, rest)), {name: repeat(value) for name, value in kwargs.items()}

    def _repeat(self, value, batch: int):
        if isinstance(value, tuple):
            return tuple(self._repeat(item, batch) for item in value)
        if not isinstance(value, Tensor) or value.dim() < 2 or len(value) != batch or batch == 1:
            return value  # one row serves all
        if id(value) not in self.known:
            self.known[id(value)] = value, value.repeat(self.count, *[1] * (value.dim() - 1))
        return self.known[id(value)][1]


def add_member_adapters(model: Model, peft_config, seeds: list[int]) -> Model:
    """Freeze a classifier and give it one LoRA adapter and one head per seed. Changes the model in place.

    What follows the backbone (the head; with DistilBERT also the layer before it) is trained in full, as PEFT does.

    peft_config: a `peft.LoraConfig`; it says which linear layers are adapted, and how. Raises `ConfigError` for kinds
    of LoRA that are more than A and B, and for targets that come before the transformer layers.
    """
    check_plain(peft_config)
    layers = layer_list(model)
    after = modules_after(model, layers)
    heads = [name for name in after if "." not in name]
    targets = _adapted(model, peft_config, seeds)
    model.requires_grad_(False)
    inside = {id(module): index for index, layer in enumerate(layers) for module in layer.modules()}
    depth = {name: inside.get(id(model.get_submodule(name))) for name in targets}
    pooling = [name for name in after if name not in heads]
    outside = [n for n in targets if depth[n] is None and not any(f"{n}.".startswith(f"{a}.") for a in pooling)]
    if outside or not any(index is not None for index in depth.values()):
        raise ConfigError(
            f"target_modules of LoRA must be inside of the layers of {type(model).__name__}, these are not: "
            f"{', '.join(outside or targets)}"
        )
    first = min(index for index in depth.values() if index is not None)
    for name, adapter in targets.items():
        model.set_submodule(name, adapter)
    rows = _Rows(len(seeds))
    for index in range(first, len(layers)):
        layers[index].register_forward_pre_hook(partial(rows, first=index == first), with_kwargs=True)
    for name in heads:
        own = Members(model.get_submodule(name), len(seeds), last=name == heads[-1])
        model.set_submodule(name, own.requires_grad_(True))
    draw_heads(model, seeds)
    model.config.get_text_config().use_cache = False  # its rows would not be the layers'
    return model


def adapter_parameters(model: Model) -> list[nn.Parameter]:
    """The stacked matrices, [K, ...] each."""
    return [p for module in model.modules() if isinstance(module, MemberLora) for p in (module.lora_A, module.lora_B)]


def check_plain(peft_config) -> None:
    """Raise `ConfigError` unless the config is of plain LoRA."""
    from peft import LoraConfig

    if type(peft_config) is not LoraConfig:
        raise ConfigError(f"members on one model need a LoraConfig, got {type(peft_config).__name__}")
    default = LoraConfig()
    changed = [f.name for f in fields(LoraConfig) if getattr(peft_config, f.name) != getattr(default, f.name)]
    other = [name for name in changed if name not in SUPPORTED]
    if other:
        raise ConfigError(f"members on one model support plain LoRA only: leave {', '.join(other)} out")


def save_adapter(model: Model, index: int, peft_config, folder: str | Path) -> None:
    """Write one member as a PEFT adapter of a classifier: `adapter_config.json` and the weights, with its head."""
    from safetensors.torch import save_file

    config = copy.deepcopy(by_names(peft_config))
    config.task_type, config.inference_mode = "SEQ_CLS", True
    config.modules_to_save = [name for name, module in model.named_modules() if isinstance(module, Members)]
    config.base_model_name_or_path = named_base(model.config.name_or_path)
    config.save_pretrained(str(folder))
    state = {name: value.detach().cpu().contiguous() for name, value in adapter_state(model, index).items()}
    save_file(state, Path(folder) / WEIGHTS_FILE)
    open_to_others(folder)


def load_adapter(model: Model, index: int, folder: str | Path) -> None:
    """Read what `save_adapter` (or PEFT) wrote into member `index`. Raises `ConfigError` unless the names match."""
    from safetensors.torch import load_file

    saved, own = load_file(Path(folder) / WEIGHTS_FILE), adapter_state(model, index)
    different = sorted(saved.keys() ^ own.keys()) or [name for name in saved if saved[name].shape != own[name].shape]
    if different:
        raise ConfigError(f"{folder} is not an adapter of the same shape as the first member: {different[0]} differs")
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(saved[name])


def adapter_state(model: Model, index: int) -> dict[str, Tensor]:
    """One member's weights under PEFT's names; views, not copies."""
    state = {}
    for name, module in model.named_modules():
        if isinstance(module, MemberLora):
            state[f"{PREFIX}{name}.lora_A.weight"] = module.lora_A.data[index]
            state[f"{PREFIX}{name}.lora_B.weight"] = module.lora_B.data[index]
        elif isinstance(module, Members):
            state |= {f"{PREFIX}{name}.{key}": value for key, value in module.members[index].state_dict().items()}
    return state


def _adapted(model: Model, peft_config, seeds: list[int]) -> dict[str, MemberLora]:
    """What PEFT would adapt, by name. PEFT finds the modules; the model is as before afterwards."""
    from peft import inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    config = copy.deepcopy(by_names(peft_config))
    config.task_type, config.modules_to_save = "SEQ_CLS", None
    with adding_lora(model):
        inject_adapter_in_model(config, model)
    found = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    adapters = {}
    for number, (name, module) in enumerate(found.items()):
        (key,) = module.r
        adapters[name] = MemberLora(
            module.base_layer,
            [seed * 100_003 + number for seed in seeds],  # no two matrices of a member alike
            features=(module.in_features, module.out_features),
            r=module.r[key],
            scaling=module.scaling[key],
            dropout=peft_config.lora_dropout,
        )
        model.set_submodule(name, module.base_layer)
    return adapters
