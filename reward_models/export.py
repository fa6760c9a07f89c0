"""Reward models as other libraries load them."""

from pathlib import Path

from align.errors import ConfigError
from align.modeling.load import load_sequence_classifier, load_tokenizer
from align.modeling.padding import padding_as_saved, with_own_padding
from align.reward_models.normalizer import Normalizer


def export_reward_model(source: str | Path, folder: str | Path, *, dtype: str = "float32") -> Path:
    """Save the reward model of `source` in `folder` as one whole model, its adapter merged.

    `AutoModelForSequenceClassification.from_pretrained(folder)` and TRL load it with the scores of `source`. They load
    the folder of an adapter too, but without its trained head, and so with scores that mean nothing. The normaliser, if
    there is one, is copied; only this library applies it. dtype: of the weights that are written.
    """
    if Path(source).resolve() == Path(folder).resolve():
        raise ConfigError(f"{source} would be overwritten by its own export: name another folder")
    tokenizer = with_own_padding(load_tokenizer(source))
    model = load_sequence_classifier(source, dtype=dtype, pad_token_id=tokenizer.pad_token_id, fresh_head=False)
    with padding_as_saved(model, tokenizer):
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    normalizer = Normalizer.load(source)
    if normalizer is not None:
        normalizer.save(folder)
    return Path(folder)
