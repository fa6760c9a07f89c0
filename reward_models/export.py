"""Reward models as other libraries load them."""

from functools import partial
from pathlib import Path

from align.errors import ConfigError
from align.modeling.export import export_model, is_reward_model
from align.reward_models.normalizer import Normalizer


def export_reward_model(source: str | Path, folder: str | Path, *, dtype: str = "float32") -> Path:
    """Save the reward model of `source` in `folder`, a new one, as one whole model, its adapter merged.

    `AutoModelForSequenceClassification.from_pretrained(folder)` and TRL load it with the scores of `source`. They load
    the folder of an adapter too, but without its trained head, and so with scores that mean nothing. The normaliser, if
    there is one, is copied; only this library applies it. dtype and the check of the scores: as `export_model`.
    """
    if not is_reward_model(source):
        raise ConfigError(f"{source} is a language model, no reward model: `align export` takes both")
    export_model(source, folder, dtype=dtype, further=partial(copy_normalizer, source))
    return Path(folder)


def copy_normalizer(source: str | Path, folder: str | Path) -> None:
    normalizer = Normalizer.load(source)
    if normalizer is not None:
        normalizer.save(folder)
