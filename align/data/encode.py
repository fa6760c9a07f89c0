"""Texts and messages to token ids: chat templates, BOS, EOS, and the boundary between prompt and completion."""

import re
from typing import TYPE_CHECKING, Any, NamedTuple

from align.data.bad_rows import BadRow
from align.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, Any]]

NOT_A_PREFIX = (
    "the chat template does not render the prompt as the beginning of prompt + answer, so the boundary between them is "
    "unknown (set another chat template, for example with trl.get_training_chat_template)"
)


class Encoded(NamedTuple):
    """prompt_ids, the ids of each completion that follows it, and whether one had to be tokenised apart."""

    prompt_ids: list[int]
    completions: list[list[int]]
    apart: bool


def check_tokenizer(tokenizer: "PreTrainedTokenizerBase", conversational: bool, needs_eos: bool) -> None:
    """Raise DataError if the tokenizer cannot do what this data needs."""
    if conversational and tokenizer.chat_template is None:
        raise DataError(
            f"the data are messages, but the tokenizer {tokenizer.name_or_path!r} has no chat template. Use the "
            "tokenizer of a chat model, set tokenizer.chat_template, or write the texts as plain strings."
        )
    if needs_eos and tokenizer.eos_token_id is None:
        raise DataError(
            f"the tokenizer {tokenizer.name_or_path!r} has no EOS token, so a model could not learn to stop. Set "
            "tokenizer.eos_token to a token of its vocabulary."
        )


def render(messages: Messages, tokenizer: "PreTrainedTokenizerBase", options: dict, answer_next: bool = False) -> str:
    """The chat template's text; with `answer_next` up to where the assistant's answer starts."""
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer_next, **options)
    except TemplateError as error:
        raise BadRow(f"the chat template refuses the messages ({error})") from error


def render_pair(
    prompt: Messages, completions: list[Messages], tokenizer: "PreTrainedTokenizerBase", options: dict
) -> tuple[str, list[str]]:
    """Texts of a prompt and of the completions that follow it. Raises BadRow if the template has no such boundary."""
    start = render(prompt, tokenizer, options, answer_next=True)
    wholes = [render(prompt + completion, tokenizer, options) for completion in completions]
    if not all(whole.startswith(start) for whole in wholes):
        raise BadRow(NOT_A_PREFIX)
    return start, [whole[len(start) :] for whole in wholes]


def encode(tokenizer: "PreTrainedTokenizerBase", rows: list[tuple[str, list[str]]], *, add_bos: bool) -> list[Encoded]:
    """Token ids of (prompt, completions) texts, without EOS.

    The prompt is tokenised alone and each completion in its context, so that the ids of both together are those of the
    whole text wherever that is possible without changing the prompt's.
    """
    if not rows:
        return []
    prompts = _ids(tokenizer, [prompt for prompt, _ in rows])
    wholes = iter(_ids(tokenizer, [prompt + text for prompt, texts in rows for text in texts]))
    bos = [tokenizer.bos_token_id] if add_bos and adds_bos(tokenizer) else []
    encoded = []
    for (_, texts), prompt_ids in zip(rows, prompts, strict=True):
        completions, apart = [], False
        for text in texts:
            whole = next(wholes)
            fits = whole[: len(prompt_ids)] == prompt_ids
            completions.append(whole[len(prompt_ids) :] if fits else _ids_apart(tokenizer, text))
            apart = apart or not fits
        start = bos if prompt_ids[:1] != bos else []
        encoded.append(Encoded(start + prompt_ids, completions, apart))
    return encoded


def encode_conversation(
    messages: Messages, tokenizer: "PreTrainedTokenizerBase", options: dict
) -> tuple[list[int], list[int]]:
    """(ids, mask) of a whole conversation up to its last assistant message; the mask is 1 on the trained tokens.

    The assistant's tokens come from the template's generation markers; without markers from rendering the conversation
    up to each answer. A line break that a template writes after an answer's EOS is not trained.
    """
    last = max(place for place, message in enumerate(messages) if message["role"] == "assistant")
    messages = messages[: last + 1]
    if re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template()):
        render(messages, tokenizer, options)  # a template that refuses is a bad row
        out = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True, **options)
        return out["input_ids"], out["assistant_masks"]
    text = render(messages, tokenizer, options)
    spans = _answers(messages, text, tokenizer, options)
    out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, mask = out["input_ids"], [0] * len(out["input_ids"])
    for start, end in spans:
        inside = [place for place, (a, b) in enumerate(out["offset_mapping"]) if b > start and a < end]
        answer = [ids[place] for place in inside]
        for place in inside[: len(up_to_eos(answer, tokenizer))]:
            mask[place] = 1
    return ids, mask


def _answers(messages: Messages, text: str, tokenizer: "PreTrainedTokenizerBase", options: dict) -> list[tuple]:
    """(start, end) of each assistant message in the rendered text, its end-of-turn token included."""
    spans = []
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if place == 0:
            raise BadRow("messages starts with an assistant message")
        before = render(messages[:place], tokenizer, options, answer_next=True)
        through = render(messages[: place + 1], tokenizer, options)
        if not (through.startswith(before) and text.startswith(through)):
            raise BadRow(NOT_A_PREFIX)
        spans.append((len(before), len(through)))
    return spans


def close(ids: list[int], tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """`ids` with exactly one EOS at the end: what a rollout that stopped looks like.

    White space that a chat template writes after the EOS is dropped.
    """
    eos = tokenizer.eos_token_id
    ids = up_to_eos(ids, tokenizer)
    while ids and ids[-1] == eos:
        ids = ids[:-1]
    return [*ids, eos]


def up_to_eos(ids: list[int], tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """`ids` without the white space after the last EOS; unchanged if there is no EOS or something else follows it."""
    eos = tokenizer.eos_token_id
    if eos not in ids:
        return ids
    end = len(ids) - ids[::-1].index(eos)
    return ids[:end] if not tokenizer.decode(ids[end:]).strip() else ids


def adds_bos(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the tokenizer puts BOS in front of a text by itself."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("")["input_ids"][:1] == [bos]


def _ids(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
    if not texts:
        return []  # tokenizers fail on an empty batch
    # Special tokens are placed by us: some tokenizers would end every prompt with EOS.
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _ids_apart(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Ids of a text that continues another: after an anchor, as some tokenizers put a space before a first word."""
    for anchor in ("\n", "."):
        start, whole = _ids(tokenizer, [anchor, anchor + text])
        if tokenizer.unk_token_id in start:
            continue  # an unknown word may be the anchor with the text's first word
        if start and whole[: len(start)] == start:
            return whole[len(start) :]
    return _ids(tokenizer, [text])[0]
