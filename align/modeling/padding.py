"""A padding token that is not the end token."""

import copy
import logging
from typing import TYPE_CHECKING

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
            "saved model one sequence at a time only; ClassifierReward does not mind. To mend it give the tokenizer a "
            "padding token of its own",
            tokenizer.eos_token,
        )
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = candidates[0]
    logger.info("the tokenizer pads with its end token: %s is the reward model's padding token", candidates[0])
    return tokenizer
