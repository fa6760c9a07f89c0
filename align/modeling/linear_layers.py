"""Linear layers by class of which an adapter would not be a low-rank change of what the model computes."""

import copy
import inspect
import re
from collections.abc import Iterator

import torch
from torch import nn

from align.modeling.types import Model

READ = re.compile(r"\bself\.(\w+)\.weight\b(?!\.(?:dtype|device|shape|data)\b|\[)")
"""A weight that a module's own code takes from a layer below it; slices are Bloom's, of an option for exact sums."""


def unfit_for_adapters(core: Model, every: bool) -> list[str]:
    """Names of transformers' layers that get no adapter.

    Some are a `Linear` by class and compute something else (routers of Phi-3.5-MoE and Llama 4, the grouped projection
    of DeepSeek V4): the adapter's product would not fit, or end the run. Jamba's routers are linear, but transformers
    would take what the adapter's own layers compute for router logits too. every: all linear layers were asked for
    (`all-linear`), which are also those that are never called, since the module above reads their weight (in Mamba's
    mixers, or in their fused kernels on GPUs): an adapter there would train nothing, and of some PEFT refuses it.
    """
    modules = dict(core.named_modules())
    routers = _routers_known_by_name(core)
    unfit = [name for name, m in modules.items() if _is_unlike(m) or name.rpartition(".")[2] in routers]
    if every:
        read = {kind: set(_read_by(kind)) for kind in {type(module) for module in modules.values()}}
        for name, module in modules.items():
            below = (child for child in read[type(module)] if isinstance(getattr(module, child, None), nn.Linear))
            unfit += [f"{name}.{child}" for child in below]
    return sorted(set(unfit))


def _of_transformers(kind: type) -> bool:
    return kind.__module__.startswith("transformers.models.")


def _routers_known_by_name(core: Model) -> set[str]:
    """Names of layers of which transformers keeps the output of every `Linear` below, as router logits."""
    kept = core.base_model.can_record_outputs.get("router_logits")
    recorders = kept if isinstance(kept, list) else [kept]
    return {r.layer_name for r in recorders if vars(r or object).get("target_class") is nn.Linear}


def _is_unlike(module: nn.Module) -> bool:
    kind = type(module)
    if not (isinstance(module, nn.Linear) and _of_transformers(kind)) or kind.forward is nn.Linear.forward:
        return False
    try:
        output = copy.deepcopy(module).to("meta")(torch.empty(2, 3, module.in_features, device="meta"))
    except (RuntimeError, TypeError, ValueError, LookupError):  # it takes other inputs, or of another shape
        return True
    return not isinstance(output, torch.Tensor) or output.shape != (2, 3, module.out_features)


def _read_by(kind: type) -> Iterator[str]:
    if _of_transformers(kind):
        for name, function in vars(kind).items():
            if inspect.isfunction(function) and not name.startswith(("__init__", "init_", "_init_")):
                yield from READ.findall(inspect.getsource(function))
