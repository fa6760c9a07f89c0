"""A model without its upper layers: a smaller base for reward models."""

from pathlib import Path


def save_lowest_layers(model: str | Path, layers: int, folder: Path) -> Path:
    """Save the model's lowest `layers` layers (all, if it has no more), with its tokenizer, unless they are there.

    Its head for words stays, and a reward model does not use it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if not (folder / "tokenizer_config.json").exists():
        layers = min(layers, AutoConfig.from_pretrained(model).num_hidden_layers)
        AutoModelForCausalLM.from_pretrained(model, num_hidden_layers=layers).save_pretrained(folder)
        AutoTokenizer.from_pretrained(model).save_pretrained(folder)  # last: it says that all is there
    return folder
