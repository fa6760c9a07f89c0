"""Half fine-tuning: half of the weights of every layer stay what they are (HFT, Hui et al. 2024, arXiv 2404.18466)."""

import random
import re
from collections import defaultdict

from torch import nn

from align.errors import ConfigError

LAYER = re.compile(r"^(?P<layer>.*?\.(?:layers|h|blocks|block)\.\d+)\.(?P<rest>.+)\.[^.]+$")


def freeze_half(model: nn.Module, seed: str) -> list[str]:
    """Switches off the gradients of half of the weights of each layer, drawn by `seed`; returns their names.

    As in the paper the draw is made within each part of a layer: of four projections of the attention two are frozen,
    of three of the MLP one or two (two in half of the layers, so that over the depth it is half), of two norms one.
    What is outside of the layers (embeddings, head, last norm) is trained. A weight and its bias go together. The same
    seed freezes the same weights, so a resumed run goes on with its own; another one is the next round of the paper's
    training in rounds.

    Raises ConfigError for a model whose layers are not found by their names (`layers.0.`, `h.0.`, `blocks.0.`).
    """
    parts: dict[tuple[str, str], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, parameter in model.named_parameters():
        found = LAYER.match(name)
        if found is None or not parameter.requires_grad:
            continue
        inner = found["rest"].split(".")
        part = inner[0] if len(inner) > 1 else "norms" if parameter.ndim == 1 else "matrices"
        parts[found["layer"], part][found["rest"]].append(name)
    if not parts:
        raise ConfigError(
            f"half_finetuning: {type(model).__name__} has no trained weights in numbered layers: train all of its "
            "weights, without an adapter",
            key="half_finetuning",
        )
    generator, larger = random.Random(seed), dict[str, bool]()
    frozen: set[str] = set()
    for (_, part), blocks in parts.items():
        count = len(blocks) // 2
        if len(blocks) % 2:  # the larger half in every second layer, beginning at random
            larger[part] = not larger.get(part, generator.random() < 0.5)
            count += larger[part]
        for block in generator.sample(sorted(blocks), count):
            frozen.update(blocks[block])
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    return sorted(frozen)
