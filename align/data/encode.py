"""Texts and messages to token ids: chat templates, BOS, and the boundary between prompt and completion."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from align.data.bad_rows import BadRow
from align.data.ending import Ending, special_ids, up_to_end
from align.data.messages import applied, refuse_dropped, refuse_left_out, refuse_unknown_tools, trained
from align.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, Any]]

NOT_A_PREFIX = (
    "the chat template does not render the prompt as the beginning of prompt + answer, so the boundary between them is "
    "unknown (set another chat template, for example with trl.get_training_chat_template, which `align sft` does with "
    "assistant_only_loss: true)"
)
ONE_ANSWER = "or train one answer per row: the earlier turns in `prompt`, or weight: 0 on the earlier answers"
APART = "prompt and completion would merge into one token, so the completion is tokenised apart"
PARTED = (
    "the template's generation prompt is not how it renders this answer (a rollout would start after <think>, say), so "
    "the prompt ends where the two part"
)
NEAR = 32  # characters of a plain prompt that are certainly enough context for what follows it


class Encoded(NamedTuple):
    """prompt_ids, the ids of each completion that follows it, and what the user should know of the boundary."""

    prompt_ids: list[int]
    completions: list[list[int]]
    note: str | None


class Conversation(NamedTuple):
    """A rendered conversation: its text with the (start, end) of what is trained, or its ids with their mask."""

    text: str
    spans: list[tuple[int, int]]
    ids: list[int] | None = None
    mask: list[int] | None = None


def check_tokenizer(tokenizer: "PreTrainedTokenizerBase", conversational: bool, needs_eos: bool) -> None:
    """Raise DataError if the tokenizer cannot do what this data needs."""
    if is_mistral_commons(tokenizer):
        raise DataError(
            "this tokenizer is mistral-common's, which has no chat template and reads no control token in a text: pass "
            "the one of align.modeling.load.load_tokenizer(model), which has the same vocabulary"
        )
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


def is_mistral_commons(tokenizer: "PreTrainedTokenizerBase") -> bool:
    return type(tokenizer).__name__ == "MistralCommonBackend"


def render(messages: Messages, tokenizer: "PreTrainedTokenizerBase", options: dict, answer_next: bool = False) -> str:
    """The chat template's text; with `answer_next` up to where the assistant's answer starts."""
    return applied(tokenizer, messages, add_generation_prompt=answer_next, **options)


def render_prompt(prompt: Messages, tokenizer: "PreTrainedTokenizerBase", options: dict) -> str:
    """The text that the policy answers; BadRow where the template leaves out a message of it."""
    text = render(prompt, tokenizer, options, answer_next=True)
    refuse_dropped(prompt, text, tokenizer, options)
    return text


def render_pair(
    prompt: Messages,
    completions: list[Messages],
    tokenizer: "PreTrainedTokenizerBase",
    options: dict,
    drawn: bool = False,
) -> tuple[str, list[str]]:
    """The prompt's text, and that of prompt + completion for each. Raises BadRow if the latter do not begin with the
    prompt's messages. They begin with the generation prompt too, but for templates that end it in `<think>`. drawn:
    the completions are a policy's, to be scored, of which a template may leave out the thoughts."""
    refuse_unknown_tools([*prompt, *sum(completions, [])], options.get("tools"), tokenizer)
    start = render(prompt, tokenizer, options, answer_next=True)
    wholes = [render(prompt + completion, tokenizer, options) for completion in completions]
    if not drawn:
        for completion, whole in zip(completions, wholes, strict=True):
            refuse_left_out([message for message in completion if trained(message)], whole)
            refuse_dropped(prompt + completion, whole, tokenizer, options)
    if not all(whole.startswith(start) for whole in wholes):
        asked = _open(render(prompt, tokenizer, options), tokenizer)
        if not start.startswith(asked) or not all(whole.startswith(asked) for whole in wholes):
            raise BadRow(NOT_A_PREFIX)
    return start, wholes


def encode(tokenizer: "PreTrainedTokenizerBase", rows: list[tuple[str, list[str]]], *, add_bos: bool) -> list[Encoded]:
    """Token ids of rows of (prompt, the whole texts that continue it), without EOS.

    The prompt is tokenised alone and each completion in its context, so that the ids of both together are those of the
    whole text wherever that is possible without changing the prompt's. A whole text that does not begin with the prompt
    is split after the longest beginning of tokens that they share.
    """
    if not rows:
        return []
    if add_bos:
        rows = [_from_bos(prompt, wholes, tokenizer.bos_token) for prompt, wholes in rows]
    prompts = ids_of(tokenizer, [prompt for prompt, _ in rows])
    contexts = _contexts(tokenizer, [prompt for prompt, _ in rows], prompts)
    texts: list[str] = []
    counts: list[int | None] = []  # tokens of the context; None where the texts do not begin with the prompt
    for (prompt, wholes), (context, length) in zip(rows, contexts, strict=True):
        inside = all(whole.startswith(prompt) for whole in wholes)
        counts.append(length if inside else None)
        texts += [context + whole[len(prompt) :] for whole in wholes] if inside else wholes
    found = iter(ids_of(tokenizer, texts))
    bos = [tokenizer.bos_token_id] if add_bos and adds_bos(tokenizer) else []
    encoded = []
    for (prompt, wholes), prompt_ids, count in zip(rows, prompts, counts, strict=True):
        ids = [next(found) for _ in wholes]
        if count is None:
            shared = min(common(prompt_ids, whole) for whole in ids)
            prompt_ids, completions, note = prompt_ids[:shared], [whole[shared:] for whole in ids], PARTED
        else:
            near, completions, note = prompt_ids[len(prompt_ids) - count :], [], None
            for whole, text in zip(ids, wholes, strict=True):
                if whole[:count] == near:
                    completions.append(whole[count:])
                else:
                    completions.append(_ids_apart(tokenizer, text[len(prompt) :]))
                    note = APART
        if bos and not prompt_ids:  # a whole text, which may have been written with BOS
            completions = [ids[1:] if ids[:1] == bos else ids for ids in completions]
        encoded.append(Encoded((bos if prompt_ids[:1] != bos else []) + prompt_ids, completions, note))
    return encoded


def _from_bos(prompt: str, wholes: list[str], bos: str | None) -> tuple[str, list[str]]:
    """The texts without white space in front of a BOS that somebody wrote, who would otherwise get a second one."""
    start = (prompt or "".join(wholes[:1])).lstrip()
    if not bos or not start.startswith(bos):
        return prompt, wholes
    return prompt.lstrip(), [whole.lstrip() for whole in wholes]


def render_conversation(
    messages: Messages, tokenizer: "PreTrainedTokenizerBase", options: dict, first: int = 0
) -> Conversation:
    """A conversation up to its last assistant message, with where the assistant's answers from message `first` on are.

    The assistant's tokens come from the template's generation markers; without markers, or where an answer is not to be
    trained, from rendering the conversation up to each answer.
    """
    last = max((index for index, message in enumerate(messages) if index >= first and trained(message)), default=None)
    if last is None:
        raise BadRow("all of the assistant's messages have weight 0, so nothing is trained")
    messages = messages[: last + 1]
    refuse_unknown_tools(messages, options.get("tools"), tokenizer)
    text = render(messages, tokenizer, options)
    refuse_left_out([message for message in messages[first:] if trained(message)], text)
    refuse_dropped(messages, text, tokenizer, options)
    every = all(trained(message) for message in messages if message["role"] == "assistant")
    if first == 0 and every and re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template()):
        marked = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        out = applied(tokenizer, messages, **marked, **options)
        return Conversation(text, [], out["input_ids"], out["assistant_masks"])
    return Conversation(text, _answers(messages, text, tokenizer, options, first))


def encode_conversations(
    tokenizer: "PreTrainedTokenizerBase", rows: list[Conversation], ending: Ending
) -> list[tuple[list[int], list[int]]]:
    """(ids, mask) of each; the mask is 1 on the answers and their end tokens. A line break that a template writes after
    an answer's end token is not trained."""
    if not rows:
        return []
    if not tokenizer.is_fast and any(row.ids is None for row in rows):
        raise DataError(
            f"the tokenizer {tokenizer.name_or_path!r} does not say where its tokens are in the text (it is no fast "
            "tokenizer), so the assistant's turns cannot be found. Use a fast tokenizer, or rows of prompt and "
            "completion."
        )
    out = tokenizer([row.text for row in rows], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    encoded: list[tuple[list[int], Any]] = []
    special = special_ids(tokenizer)
    for row, ids, offsets in zip(rows, out["input_ids"], out["offset_mapping"], strict=True):
        if row.ids is not None and row.mask is not None:
            ids, places = row.ids, np.flatnonzero(row.mask)
            answers = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)
        else:
            starts, ends = np.array(offsets).reshape(-1, 2).T
            answers = [_places(row.text, ids, starts, ends, span, special) for span in row.spans]
        mask = [0] * len(ids)
        for inside in (answer.tolist() for answer in answers):
            answer = [ids[index] for index in inside]
            for index in inside[: len(up_to_end(answer, ending, tokenizer))]:
                mask[index] = 1
        encoded.append((ids, mask))
    return encoded


def _places(text: str, ids: list[int], starts: Any, ends: Any, span: tuple[int, int], special: set[int]) -> Any:
    """Where the tokens of a span of the text are, with those that reach over its edges: a space of the prompt that its
    first word takes, or the line break of the next turn that its last full stop takes. But a token that has only white
    space of the span is the next turn's (Mistral's " [" of " [INST]"), and a special token, which may have taken the
    white space after it, is in the turn in which it begins."""
    start, end = span
    inside = np.flatnonzero((ends > start) & (starts < end))
    if len(inside) and starts[inside[0]] < start and ids[inside[0]] in special:
        inside = inside[1:]
    if len(inside) and ends[inside[-1]] > end and not text[starts[inside[-1]] : end].strip():
        inside = inside[:-1]
    return inside


def _answers(messages: Messages, text: str, tokenizer, options: dict, first: int) -> list[tuple[int, int]]:
    """(start, end) of each assistant message in the rendered text, its end-of-turn token included."""
    spans = []
    for index, message in enumerate(messages):
        if not trained(message) or index < first:
            continue
        if index == 0:
            raise BadRow("messages starts with an assistant message")
        asked = render(messages[:index], tokenizer, options)
        before = render(messages[:index], tokenizer, options, answer_next=True)
        through = render(messages[: index + 1], tokenizer, options)
        if not through.startswith(before):  # a generation prompt that ends in <think>
            before = before[: common(before, through)]
        if not before.startswith(asked):
            asked = _open(asked, tokenizer)
        if not text.startswith(through):
            through = _open(through, tokenizer)
        if not (before.startswith(asked) and text.startswith(through)):
            raise BadRow(f"{NOT_A_PREFIX}; {ONE_ANSWER}")
        spans.append((len(before), len(through)))
    return spans


def _open(text: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """A rendered conversation without the EOS that some templates (Phi-3's) write after its last turn only."""
    return text.removesuffix(tokenizer.eos_token or "")


def adds_bos(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the tokenizer puts BOS in front of a text by itself."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("")["input_ids"][:1] == [bos]


def ids_of(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
    if not texts:
        return []  # tokenizers fail on an empty batch
    # Special tokens are placed by us: some tokenizers would end every prompt with EOS.
    if (backend := plain_backend(tokenizer)) is not None:
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def plain_backend(tokenizer: "PreTrainedTokenizerBase") -> Any:
    """What a fast tokenizer calls, if it does nothing else with a text: without places in the text, which nobody asks
    for here, it takes a quarter less time. None where it may do more, or cut or pad."""
    from transformers import PreTrainedTokenizerFast

    methods = ("__call__", "_encode_plus")
    if any(getattr(type(tokenizer), name, None) is not getattr(PreTrainedTokenizerFast, name) for name in methods):
        return None
    backend = tokenizer.backend_tokenizer
    plain = backend.truncation is None and backend.padding is None
    return backend if plain and backend.encode_special_tokens == tokenizer.split_special_tokens else None


def _contexts(tokenizer: "PreTrainedTokenizerBase", prompts: list[str], ids: list[list[int]]) -> list[tuple[str, int]]:
    """The end of each prompt that a completion has to be tokenised with, and how many tokens it is.

    A special token splits a text before anything else does, so what follows the last one is tokenised as if it stood
    alone. A plain prompt is split at a space into parts that are tokenised as the whole is, where that holds; else the
    context is the prompt.
    """
    whole = [(prompt, len(own)) for prompt, own in zip(prompts, ids, strict=True)]
    if not tokenizer.is_fast:
        return whole
    special = special_ids(tokenizer)
    contexts: list[tuple[str, int] | None] = []
    for prompt, own in zip(prompts, ids, strict=True):
        index = next((index for index in range(len(own) - 1, -1, -1) if own[index] in special), None)
        start = -1 if index is None else prompt.rfind(tokenizer.convert_ids_to_tokens(own[index]))
        contexts.append(None if index is None or start < 0 else (prompt[start:], len(own) - index))
    splits = tokenizer.backend_tokenizer.pre_tokenizer is not None
    starts = [prompt.rfind(" ", 0, max(len(prompt) - NEAR, 0)) for prompt in prompts]
    rest = [i for i, context in enumerate(contexts) if context is None and splits and starts[i] > 0]
    for i, near in zip(rest, ids_of(tokenizer, [prompts[i][starts[i] :] for i in rest]), strict=True):
        if ids[i][len(ids[i]) - len(near) :] == near and not prompts[i][starts[i] - 1].isspace():
            contexts[i] = prompts[i][starts[i] :], len(near)
    return [context or fallback for context, fallback in zip(contexts, whole, strict=True)]


def common(a: Sequence, b: Sequence) -> int:
    """How many items two sequences begin with in common."""
    return next((index for index, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _ids_apart(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Ids of a text that continues another: after an anchor, as some tokenizers put a space before a first word."""
    for anchor in ("\n", "."):
        start, whole = ids_of(tokenizer, [anchor, anchor + text])
        if tokenizer.unk_token_id in start:
            continue  # an unknown word may be the anchor with the text's first word
        if start and whole[: len(start)] == start:
            return whole[len(start) :]
    return ids_of(tokenizer, [text])[0]
