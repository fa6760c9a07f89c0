"""Names of an adapter's config that the model has not."""

import re

from align.errors import ConfigError
from align.modeling.types import Model

HEADS = ("classifier", "score")
"""Of classifiers, of which PEFT adds both to `modules_to_save`."""
LAYER = re.compile(r".*?\.[^.]*\.(\d+)\.")  # PEFT's, for the index in a layer's name

NOT_OF_ADAPTER = {  # where an adapter's base lies, and what PEFT writes down for itself
    "base_model_name_or_path", "inference_mode", "revision", "auto_mapping", "peft_version", "runtime_config",
}  # fmt: skip
WITHIN = re.compile(r"\.(lora_|base_layer|modules_to_save|original_module)")
"""In the names of what PEFT has put in."""


def check_names(core: Model, config) -> None:
    """ConfigError for a name in `target_modules` or `modules_to_save`, or a layer of `layers_to_transform`, that the
    model has not: PEFT passes over it without a word where another one is there. config: as PEFT has changed it when
    it added the adapter, to which some names of experts' layers are parameters."""
    names = [name for name, _ in core.named_modules()]
    targets, whole = vars(config).get("target_modules") or (), vars(config).get("modules_to_save") or ()
    layers = vars(config).get("layers_to_transform")
    there = {int(found[1]) for name in names if (found := LAYER.match(name))}
    missing = {
        "target_modules": [] if isinstance(targets, str) else [t for t in targets if not _ends(names, t, f".{t}")],
        "modules_to_save": [m for m in whole if m not in HEADS and not _ends(names, m, m)],
        "layers_to_transform": [i for i in ([layers] if isinstance(layers, int) else layers or ()) if i not in there],
    }
    for option, wanted in missing.items():
        if wanted:
            own = (name for name in names if not WITHIN.search(name))
            last = sorted({name.rpartition(".")[2] for name in own if name and not name[-1].isdigit()})
            has = f"layers 0 to {max(there)}" if option == "layers_to_transform" and there else ", ".join(last)
            raise ConfigError(
                f"{option} of LoRA: {type(core).__name__} has no {', '.join(sorted(map(str, wanted)))}, which would be "
                f"left out without a word: it has {has}"
            )


def _ends(names: list[str], whole: str, end: str) -> bool:
    return any(name == whole or name.endswith(end) for name in names)
