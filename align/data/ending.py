"""Where an answer ends: one rule for data, rollouts and rewards.

A plain text ends with the tokenizer's EOS. An answer of a conversation ends with the first special token that the chat
template writes after it (`<end_of_turn>` of Gemma, `<|im_end|>` of ChatML, `<|eot_id|>` of Llama 3), whatever the
tokenizer calls its EOS; with EOS where the template writes none. The rest of what the template writes after an answer,
mostly a line break, is no part of it: a rollout stops before. An answer that calls a tool may end with a token of its
own (`<|call|>` of GPT-OSS, `<|tool_response>` of Gemma 4).
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from align.data.bad_rows import BadRow
from align.data.messages import PROBED, PROBED_CALL, applied

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

ANSWER = "Probe-7319"
ASKED = {"role": "user", "content": "Hi"}


@dataclass(frozen=True)
class Ending:
    """token: what ends an answer. tail: what the chat template writes after it at the end of a conversation. written:
    whether the template writes the token; if not it is added. accepted: every token that counts as an end.
    conversational: whether it is that of a conversation's answers. call: what ends a call of tools, where that is
    another token."""

    token: int
    tail: tuple[int, ...] = ()
    written: bool = False
    accepted: tuple[int, ...] = ()
    conversational: bool = False
    call: int | None = None


def ending_of(tokenizer: "PreTrainedTokenizerBase", conversational: bool) -> Ending:
    """How the answers of a conversation, or plain texts, end."""
    turn = _turn_end(tokenizer)
    call = _call_end(tokenizer, turn[0] if turn else None)
    eos = tokenizer.eos_token_id
    ends = (eos, turn[0] if turn else None, call)
    accepted = tuple(dict.fromkeys(token for token in ends if token is not None))
    if conversational and turn:
        return Ending(turn[0], turn[1], True, accepted, True, call)
    return Ending(eos, (), False, accepted, conversational, call)


def end_ids(tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    """Every token id that ends an answer as far as the tokenizer knows: EOS, and its template's ends of a turn and of a
    call."""
    return ending_of(tokenizer, True).accepted


def generation_with_ends(config: "GenerationConfig", tokenizer: "PreTrainedTokenizerBase") -> "GenerationConfig":
    """A copy of a model's generation config in which every token that ends an answer is an end token: transformers and
    servers stop at no other."""
    config, own = copy.deepcopy(config), config.eos_token_id
    known = own if isinstance(own, list) else [] if own is None else [own]
    ends = list(dict.fromkeys([*known, *end_ids(tokenizer)]))
    if ends:
        config.eos_token_id = ends[0] if len(ends) == 1 else ends
    return config


def close(ids: Sequence[int], ending: Ending, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """`ids` with exactly one end token at the end: what a rollout that stopped looks like.

    What a template, or a user, wrote after the end token is dropped if it is the template's tail or white space.
    """
    ids = up_to_end(ids, ending, tokenizer)
    found = None
    while ids and ids[-1] in ending.accepted:
        found = ids.pop()
    if found is None or (ending.written and found != ending.call):
        found = ending.token
    return [*ids, found]


def up_to_end(ids: Sequence[int], ending: Ending, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """`ids` without what follows the last end token; unchanged if there is none or if more than white space follows."""
    ids, tail = list(ids), list(ending.tail)
    if tail and ids[-len(tail) - 1 :] == [ending.token, *tail]:
        return ids[: -len(tail)]
    end = next((index for index in range(len(ids), 0, -1) if ids[index - 1] in ending.accepted), None)
    if end is None or end == len(ids) or tokenizer.decode(ids[end:]).strip():
        return ids
    return ids[:end]


def written_text(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int], stopped: bool) -> str:
    """What a policy wrote, for whoever judges it: without the end token and padding, with every other special token.

    stopped: whether the last token is one that ended the completion, which need not be one that the tokenizer knows.
    """
    dropped, ids = {*end_ids(tokenizer), tokenizer.pad_token_id}, list(ids)
    if stopped and ids and ids[-1] in special_ids(tokenizer):
        ids.pop()
    while ids and ids[-1] in dropped:
        ids.pop()
    return tokenizer.decode(ids, skip_special_tokens=False)


def special_ids(tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """The ids of the control tokens, the unknown one left out unless it has another use."""
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    used = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id}
    unknown = {tokenizer.unk_token_id} - used
    return (added | set(tokenizer.all_special_ids)) - unknown


def _turn_end(tokenizer: "PreTrainedTokenizerBase") -> tuple[int, tuple[int, ...]] | None:
    """(first special token, what follows it) of what the chat template writes after the last answer."""
    ids = _after(tokenizer, {"content": ANSWER}, ANSWER)
    special = special_ids(tokenizer) if ids else set()
    index = next((index for index, token in enumerate(ids) if token in special), None)
    return None if index is None else (ids[index], tuple(ids[index + 1 :]))


def _call_end(tokenizer: "PreTrainedTokenizerBase", turn: int | None) -> int | None:
    """The special token with which the chat template ends an answer that calls a tool, if that is not `turn`."""
    if "tool_calls" not in str(tokenizer.chat_template):
        return None
    ids, special = _after(tokenizer, {"content": "", "tool_calls": [PROBED_CALL]}, PROBED), special_ids(tokenizer)
    index = next((index for index in range(len(ids) - 1, -1, -1) if ids[index] in special), None)
    if index is None or turn in ids or tokenizer.decode(ids[index + 1 :]).strip():
        return None
    return ids[index]


def _after(tokenizer: "PreTrainedTokenizerBase", answer: dict, said: str) -> list[int]:
    """What the chat template writes after the last `said` of an answer."""
    if not tokenizer.chat_template:
        return []
    try:
        text = applied(tokenizer, [ASKED, {"role": "assistant", **answer}])
    except BadRow:  # a template for other conversations: what it refuses is said row by row
        return []
    _, found, after = text.rpartition(said)
    return tokenizer(after, add_special_tokens=False, verbose=False)["input_ids"] if found and after else []
