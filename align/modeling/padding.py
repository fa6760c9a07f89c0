"""The padding token of reward models, by which transformers and TRL find the last token of a sequence."""

import copy
import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING

from align.modeling.types import Model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def with_own_padding(tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedTokenizerBase":
    """The tokenizer, or a copy of it whose padding token is not its end token.

    transformers and TRL read a classifier's score at the last token that is not the padding token. Where that is the
    end token too, they would read the one before it. Another special token of the vocabulary then serves as padding:
    one made for that, or BOS, which no text ends with. Without any the tokenizer comes back as it is, with a warning.
    """
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return tokenizer
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
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
