"""What transformers draws at random, or leaves out, where a checkpoint's weights are not those of the model's class."""

import logging
from collections.abc import Iterable
from typing import Any

from torch import nn

from align.errors import ConfigError
from align.modeling.text_part import unreached
from align.modeling.types import Model

logger = logging.getLogger(__name__)

OF_WORDS = ("lm_head", "embed_out", "output", "cls", "lm_predictions", "mask_predictions", "generator_predictions")
"""Output layers of language models, which no reward model has."""


def check_complete(model: Model, source: str, report: dict[str, Any]) -> None:
    """ConfigError for a language model of which a weight is drawn at random. report: of `from_pretrained`."""
    missing = set(report["missing_keys"])
    lost = _parameters(model, missing)
    layer = model.get_output_embeddings()
    names = [name for name, module in model.named_modules() if module is layer and f"{name}.weight" in missing]
    if names and not set(lost) - {f"{names[0]}.weight"}:
        raise ConfigError(
            f"{source} holds no weights for its output layer ({names[0]}.weight), which would be drawn at random: it "
            "is the trunk of a model or a classifier, and a language model is needed here"
        )
    _refuse(source, lost, report)


def check_classifier(model: Model, source: str, report: dict[str, Any], head: str, *, drawn: bool) -> None:
    """The same of a reward model, apart from its head. head: name of the layer that makes the score. drawn: whether the
    checkpoint has none, and one is drawn; then the layers between it and the trunk may be new too (a pooler)."""
    lost = [name for name in _parameters(model, report["missing_keys"]) if not name.startswith(f"{head}.")]
    trunk = f"{model.base_model_prefix}."
    new = [name for name in lost if drawn and (not name.startswith(trunk) or "pooler" in name)]
    _refuse(source, [name for name in lost if name not in new], report)
    if new:
        logger.warning("%s holds no weights for %s: they are new, drawn at random", source, ", ".join(new))
    left = _left_out(report, trunk)
    of_head = [name for name in left if name.split(".")[0] == head.split(".")[0]]
    if of_head and not drawn:
        raise ConfigError(
            f"the score of {source} is computed with {_some(of_head)} too, for which {type(model).__name__} has no "
            "place: its scores would be others than the model's. Serve it with its own code (type: remote), or call "
            "that in a function of yours"
        )
    if left:
        logger.warning(
            "%s holds %s, for which %s has no place: %s",
            source,
            _some(left),
            type(model).__name__,
            f"a new head, {head}, is drawn. If the score's layer is among them, rename it to {head}.weight"
            if drawn
            else "the score is computed without them. If the model's own code uses them, its scores are others",
        )


def what_else(report: dict[str, Any], model: Model, head: str) -> str:
    """For the error on a reward model without a head: what it holds in its place."""
    left = _left_out(report, f"{model.base_model_prefix}.")
    if not left:
        return ""
    return (
        f". It holds {_some(left)}: if that is one linear layer under another name (OpenRLHF's value_head), rename it "
        f"to {head}.weight in the checkpoint; if code of its own computes the score otherwise, serve it (type: remote)"
    )


def _parameters(model: Model, missing: Iterable[str]) -> list[str]:
    """Those of the missing names that are weights, and no buffers; without biases, which are 0 where there are none,
    and without what no text reaches."""
    unseen = tuple(f"{name}." for name in unreached(model))
    known = {name for name, _ in nn.Module.named_parameters(model, remove_duplicate=False)}
    return sorted(n for n in known.intersection(missing) if not (n.endswith("bias") or n.startswith(unseen)))


def _left_out(report: dict[str, Any], trunk: str) -> list[str]:
    found = (name for name in report["unexpected_keys"] if not name.startswith(trunk))
    return sorted(name for name in found if name.split(".")[0] not in OF_WORDS and not name.endswith("inv_freq"))


def _refuse(source: str, lost: list[str], report: dict[str, Any]) -> None:
    if not lost:
        return
    others = sorted(report["unexpected_keys"])
    raise ConfigError(
        f"{source} holds no weights for {_some(lost)}, which would be drawn at random: "
        + (
            f"it holds {_some(others)}, for which the model has no place. Give the weights the names of the model that "
            "config.json describes"
            if others
            else "the checkpoint is not complete, or its config.json is that of another model"
        )
    )


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
