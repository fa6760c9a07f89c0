"""Adapters that a merge would make another model of."""

from typing import Any

from align.errors import ConfigError


def check_mergeable(model: Any) -> None:
    """ConfigError for an adapter that no merge takes: a bias on a layer that has none, and updates of layers that share
    one weight (`layer_replication`), to which each of them would be added. `merge` parts input and output embeddings.
    """
    from peft.tuners.lora import LoraLayer

    core = model.get_base_model()
    ends, names = (core.get_input_embeddings(), core.get_output_embeddings()), dict[int, str]()
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        base = layer.get_base_layer()
        if any(layer.lora_bias.values()) and getattr(base, "bias", None) is None:
            raise ConfigError(
                f"lora_bias: {name} has no bias that the adapter's could be merged into: train the adapter without it"
            )
        # of the parameters alone: what a property computes has an id that a later one may have again
        weight = None if layer in ends else base._parameters.get("weight")
        other = None if weight is None else names.setdefault(id(weight), name)
        if other not in (None, name):
            raise ConfigError(
                f"{name} and {other} share one weight (layer_replication, or the model's own), to which a merge would "
                "add the updates of both: leave one of them out of the adapter, or save a model that has the layers "
                "twice and start from that"
            )
