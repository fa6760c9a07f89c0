"""The padding token of reward models, by which transformers and TRL find the last token of a sequence."""

import copy
import logging
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.data.limits import known_tokens
from align.errors import ConfigError
from align.modeling.adapters import is_adapter
from align.modeling.pretrained import pretrained_config
from align.modeling.types import Model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def fit_padding(tokenizer: "PreTrainedTokenizerBase", model: "str | Path | Model", **kwargs: Any) -> None:
    """In place: the end token pads where the padding token was added to the tokenizer alone. The model, loaded or a
    folder or hub name, has no embedding of it, and a config that names it makes a saved model that nothing loads.
    kwargs: options of `from_pretrained`."""
    padding = tokenizer.pad_token_id
    if padding is None or tokenizer.eos_token_id in (None, padding):
        return
    if isinstance(model, (str, Path)) and is_adapter(model):  # which may bring embeddings of its own
        return
    known = embeddings_of(model, **kwargs)
    if known is not None and padding >= known:
        logger.warning(
            "the model has %d embeddings, and none for its tokenizer's padding token %s (%d): the end token %s pads "
            "instead",
            *(known, tokenizer.pad_token, padding, tokenizer.eos_token),
        )
        tokenizer.pad_token = tokenizer.eos_token


def embeddings_of(model: "str | Path | Model", **kwargs: Any) -> int | None:
    """Tokens that a model, loaded or a folder or hub name, has embeddings for; of an adapter its base. None where its
    config does not say."""
    if not isinstance(model, (str, Path)):
        return known_tokens(model) if hasattr(model, "get_input_embeddings") else None
    try:
        config = pretrained_config(str(model), "model", **kwargs)
    except ConfigError:  # a folder with a tokenizer alone
        return None
    return getattr(config.get_text_config(), "vocab_size", None)


def with_own_padding(tokenizer: "PreTrainedTokenizerBase", known: int | None = None) -> "PreTrainedTokenizerBase":
    """The tokenizer, or a copy of it whose padding token is not its end token. known: embeddings of the model; None:
    of all tokens.

    transformers and TRL read a classifier's score at the last token that is not the padding token. Where that is the
    end token too, they would read the one before it. Another special token of the vocabulary then serves as padding:
    one made for that, or BOS, which no text ends with. Without any the tokenizer comes back as it is, with a warning.
    """
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return tokenizer
    added = tokenizer.added_tokens_decoder.items()
    special = [str(token) for number, token in added if token.special and (known is None or number < known)]
    candidates = [token for token in special if "pad" in token.lower()]
    if tokenizer.bos_token is not None and tokenizer.bos_token_id != tokenizer.eos_token_id:
        candidates.append(tokenizer.bos_token)
    candidates = [token for token in candidates if token != tokenizer.eos_token]
    if not candidates:
        logger.warning(
            "the tokenizer pads with its end token %s and has no other special token: transformers will score the "
            "saved model one sequence at a time only; ClassifierReward works either way. To fix it give the "
            "tokenizer a padding token of its own",
            tokenizer.eos_token,
        )
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = candidates[0]
    logger.info("the tokenizer pads with its end token: %s is the reward model's padding token", candidates[0])
    return tokenizer


def take_batches(model: Model, tokenizer: "PreTrainedTokenizerBase") -> Model:
    """The classifier, of which transformers refuses batches where its config names no padding token. Where scores are
    read the attention mask says (`modeling.scores`), so the end token does no harm here."""
    config = model.config.get_text_config()
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    return model


@contextmanager
def padding_as_saved(model, tokenizer: "PreTrainedTokenizerBase"):
    """While a classifier is saved, its config names the tokenizer's padding token; none if that is the end token.

    A config that names the end token makes transformers read the token before it. One that names none makes it read the
    last token of a single sequence, which is right, and refuse several.
    """
    config = model.config.get_text_config()
    before, padding = config.pad_token_id, tokenizer.pad_token_id
    config.pad_token_id = None if padding == tokenizer.eos_token_id else padding
    try:
        yield
    finally:
        config.pad_token_id = before
