"""From rows of text to token ids, every row checked before anything trains.

One rule makes training and rollouts agree: `prompt_ids` are the tokens of the prompt alone, exactly what a rollout
starts from; a completion is the tokens after these. It is tokenised in its context; where the tokenizer would merge
the end of the prompt with the start of the completion into one token, it is tokenised apart, and the row is noted.

A plain text gets BOS in front if the tokenizer puts one there, once; a chat template brings its own. A completion ends
with exactly one end token (`align.data.ending`), unless the length limit cut it. Masks come from lengths and positions,
never from token ids, so a tokenizer whose pad token is its EOS still trains the EOS.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from align.data import checks
from align.data.bad_rows import BadRow, BadRows
from align.data.dialogue import warn_of_dialogues, warn_of_text_prompts
from align.data.encode import (
    Conversation,
    Encoded,
    check_tokenizer,
    encode,
    encode_conversations,
    render_conversation,
    render_pair,
    render_prompt,
)
from align.data.ending import Ending, close, end_ids, ending_of, special_ids
from align.data.formats import DataFormat, format_for
from align.data.messages import by_role, refuse_calls, trained
from align.data.passes import Columns, Note, Recipe, started, tokenized
from align.data.tokenized import check_room, cut_pair
from align.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def tokenize_prompts(
    dataset: "Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_prompt_length: int | None,
    max_bad_share: float = 0.0,
    source: str = "",
    report: BadRows | None = None,
    num_proc: int | None = None,
    template_options: dict[str, Any] | None = None,
    streams: bool = False,
    completed: bool = False,
) -> "Dataset":
    """Prompts for rollouts: columns `prompt_ids`, `prompt` (text or messages), `row`, and every other column.

    A preference set gives its prompts. A prompt longer than `max_prompt_length` tokens is a bad row; it is never cut.
    source: what to call the data in messages. report: receives what was found. num_proc: processes that tokenise; more
    rows than `align.data.passes.IN_MEMORY` are kept on disk and found there the next time. `row` counts from 0; a
    whole-number column `row` that the data has already is kept, so that rows selected from a larger set keep theirs.
    template_options: further variables of the chat template, for all rows; a row's own come first.
    streams: a `datasets.IterableDataset` may be given, whose rows are tokenised as they are reached.
    completed: an environment adds to each prompt's last message, which may be empty.

    Raises DataError if more than `max_bad_share` of the rows are bad, or none is left.
    """
    report, sample = started(report, source, dataset, streams)
    fmt = format_for(sample, "prompts", report.source)
    if not fmt.conversational:
        if template_options:
            raise DataError(
                f"{report.source}: chat_template_kwargs are for prompts of messages, and these are texts, which no "
                "chat template is applied to: leave them out"
            )
        warn_of_text_prompts(sample, tokenizer, report.source)
    check_tokenizer(tokenizer, fmt.conversational, needs_eos=False)
    controls = controls_of(tokenizer)

    def prepare(row: Columns, note: Note) -> tuple[tuple, Columns]:
        prompt = checks.prompt_of(row, fmt, completed)
        options = {**(template_options or {}), **checks.template_kwargs(row)}
        if fmt.conversational:
            refuse_calls(
                "rollouts offer none of the data's tools (docs/environments.md: those of a run)", prompt=prompt
            )
            note_typed("prompt", checks.typed_tokens(prompt, list(controls.values())), note)
        text = render_prompt(prompt, tokenizer, options) if fmt.conversational else prompt
        return (text, []), {"prompt": prompt}

    def finish(encoded: Encoded, note: Note) -> Columns:
        check_prompt(encoded.prompt_ids, max_prompt_length, tokenizer)
        if not fmt.conversational:
            note_typed("prompt", tokens_inside(encoded.prompt_ids[1:], controls), note)
        return {"prompt_ids": encoded.prompt_ids}

    columns = {"prompt": by_role(sample.features["chosen" if fmt.implicit_prompt else "prompt"]), "prompt_ids": "int32"}
    recipe = Recipe(prepare, partial(_encode, tokenizer, fmt), finish, columns)
    limits: dict[str, Any] = {"use": "prompts", "max_prompt_length": max_prompt_length}
    limits |= {"template_options": template_options} if template_options else {}
    limits |= {"completed": True} if completed else {}
    return tokenized(dataset, tokenizer, recipe, limits, report, max_bad_share=max_bad_share, num_proc=num_proc)


def tokenize_completions(
    dataset: "Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int | None,
    max_bad_share: float = 0.0,
    source: str = "",
    report: BadRows | None = None,
    num_proc: int | None = None,
    scored: bool = False,
) -> "Dataset":
    """Demonstrations for SFT: columns `input_ids`, `completion_mask` (1 on trained tokens), `row`, and every other.

    Trained are: the completion of prompt-completion rows; the chosen completion of preference rows; every token of
    `text`; the assistant's messages of `messages`. Longer sequences are cut at `max_length` tokens and counted; a row
    that would keep no trained token is bad. scored: so is one with a `score` outside [0, 1]; it may be missing.
    Otherwise as `tokenize_prompts`.
    """
    report, sample = started(report, source, dataset, streams=True)
    fmt = format_for(sample, "completions", report.source)
    if not fmt.conversational:
        warn_of_dialogues(sample, tokenizer, report.source)
    check_tokenizer(tokenizer, fmt.conversational, needs_eos=True)
    _check_columns(sample, ("input_ids", "labels"), report.source)
    ending, controls = ending_of(tokenizer, fmt.conversational), controls_of(tokenizer)
    whole = fmt.kind == "language_modeling"
    name = "messages" if whole and fmt.conversational else "text" if whole else "completion"

    def prepare_conversation(row: Columns, note: Note) -> tuple[Any, Columns]:
        prompt, completion = _talk_of(row, fmt)
        first, messages = len(prompt), prompt + completion
        note_typed(name, checks.typed_tokens(messages[first:], list(controls.values())), note)
        options = checks.template_kwargs(row, tools=True)
        if not whole and len(completion) == 1 and trained(completion[0]):
            return render_pair(prompt, [completion], tokenizer, options), {}
        return render_conversation(messages, tokenizer, options, first), {}

    def finish(encoded: Any, note: Note) -> Columns:
        if isinstance(encoded, Encoded):
            if not whole:
                check_prompt(encoded.prompt_ids, None, tokenizer)
                check_room(encoded.prompt_ids, max_length)
            if whole and [*encoded.prompt_ids, *encoded.completions[0]][:2] == 2 * [tokenizer.bos_token_id]:
                raise BadRow("text starts with BOS twice")
            completion = closed(encoded, 0, name, tokenizer, ending, note)
            if not fmt.conversational:
                check_inside(name, completion[:-1], controls, note, None if whole else tokenizer)
            mask = [0] * len(encoded.prompt_ids) + [1] * len(completion)
            return _sequence(encoded.prompt_ids + completion, mask, max_length, note)
        ids, mask = closed_talk(encoded, ending, tokenizer, note)
        return _sequence(ids, mask, max_length, note)

    recipe = Recipe(
        partial(_prepare, scored, prepare_conversation if fmt.conversational else partial(_prepare_text, fmt)),
        partial(_encode_talks, tokenizer, ending) if fmt.conversational else partial(_encode, tokenizer, fmt),
        finish,
        {"input_ids": "int32", "completion_mask": "int8"},
    )
    limits = {"use": "completions", "max_length": max_length, **({"scored": True} if scored else {})}
    return tokenized(dataset, tokenizer, recipe, limits, report, max_bad_share=max_bad_share, num_proc=num_proc)


def _prepare(scored: bool, prepare: Callable, row: Columns, note: Note) -> tuple[Any, Columns]:
    if scored:
        checks.check_score(row)
    if row.get("label") is False:
        note("an answer with label false (undesirable, as KTO reads it) is trained as a demonstration")
    return prepare(row, note)


def _talk_of(row: Columns, fmt: DataFormat) -> tuple[Any, Any]:
    """The messages before those that are trained, and these; of a whole conversation all are the latter."""
    return ([], checks.text_of(row, fmt)) if fmt.kind == "language_modeling" else checks.completion_of(row, fmt)


def _prepare_text(fmt: DataFormat, row: Columns, note: Note) -> tuple[tuple, Columns]:
    """The prompt ("" of a whole `text`) and the whole of a row that is no conversation."""
    if fmt.kind == "language_modeling":
        return ("", [checks.text_of(row, fmt)]), {}
    prompt, completion = checks.completion_of(row, fmt)
    return (prompt, [prompt + completion]), {}


def tokenize_pairs(
    dataset: "Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int | None,
    max_prompt_length: int | None = None,
    max_bad_share: float = 0.0,
    source: str = "",
    report: BadRows | None = None,
    num_proc: int | None = None,
    scored: bool = False,
) -> "Dataset":
    """Preference pairs: columns `prompt_ids`, `chosen_ids`, `rejected_ids`, `row`, and every other column.

    Prompt and completion together are at most `max_length` tokens: a longer completion is cut (it then has no EOS) and
    counted. A prompt that is longer than `max_prompt_length`, or leaves no room for a completion, is a bad row; so is a
    pair whose two completions are the same tokens, or whose `margin` or `chosen_prob` is no finite number or no
    probability. An implicit prompt is taken out of `chosen` and `rejected`. Of `completions` with `scores` the best and
    the worst are the pair (`checks.best_and_worst`), with the further columns `chosen_score` and `rejected_score`.

    scored: for models that read an answer and score it at its end: others may speak in it, such as a tool.

    Otherwise as `tokenize_prompts`.
    """
    report, sample = started(report, source, dataset, streams=True)
    fmt = format_for(sample, "pairs", report.source)
    if not fmt.conversational:
        warn_of_dialogues(sample, tokenizer, report.source)
    check_tokenizer(tokenizer, fmt.conversational, needs_eos=True)
    ending, controls = ending_of(tokenizer, fmt.conversational), controls_of(tokenizer)

    def prepare(row: Columns, note: Note) -> tuple[tuple, Columns]:
        made = checks.best_and_worst(row) if fmt.scored else {}
        prompt, chosen, rejected = checks.pair_of(row, fmt, scored)
        checks.check_pair_numbers(row, note)
        if fmt.conversational:
            for name, answer in (("chosen", chosen), ("rejected", rejected)):
                note_typed(name, checks.typed_tokens(answer, list(controls.values())), note)
            texts = render_pair(prompt, [chosen, rejected], tokenizer, checks.template_kwargs(row, tools=True))
        else:
            texts = prompt, [prompt + chosen, prompt + rejected]
        return texts, {**made, "prompt": prompt, "chosen": chosen, "rejected": rejected}

    def finish(encoded: Encoded, note: Note) -> Columns:
        check_prompt(encoded.prompt_ids, max_prompt_length, tokenizer)
        check_room(encoded.prompt_ids, max_length)
        ids: Columns = {"prompt_ids": encoded.prompt_ids}
        for index, name in enumerate(("chosen", "rejected")):
            ids[f"{name}_ids"] = whole = closed(encoded, index, name, tokenizer, ending, note)
            if not fmt.conversational:
                check_inside(name, whole[:-1], controls, note, None if scored else tokenizer)
        return cut_pair(ids, max_length, note)

    recipe = Recipe(prepare, partial(_encode, tokenizer, fmt), finish, pair_columns(sample, fmt))
    limits = {"use": "pairs", "max_length": max_length, "max_prompt_length": max_prompt_length, "scored": scored}
    return tokenized(dataset, tokenizer, recipe, limits, report, max_bad_share=max_bad_share, num_proc=num_proc)


def pair_columns(sample: "Dataset", fmt: DataFormat) -> dict[str, Any]:
    from datasets import Value

    features = sample.features
    one = getattr(features["completions"], "feature", Value("string")) if fmt.scored else None
    texts = {name: by_role(one or features[name]) for name in ("chosen", "rejected")}
    prompt = texts["chosen"] if fmt.implicit_prompt else by_role(features["prompt"])
    columns = {"prompt": prompt, **texts, **dict.fromkeys(("prompt_ids", "chosen_ids", "rejected_ids"), "int32")}
    if fmt.scored:
        columns |= dict.fromkeys(("chosen_score", "rejected_score"), Value("float64"))
    return columns


def _encode(tokenizer, fmt: DataFormat, rows: list) -> list:
    return encode(tokenizer, rows, add_bos=not fmt.conversational)


def _encode_talks(tokenizer, ending, rows: list) -> list:
    """Pairs of texts where the answer is one; conversations where somebody else speaks in it."""
    talks = iter(encode_conversations(tokenizer, [r for r in rows if isinstance(r, Conversation)], ending))
    plain = iter(encode(tokenizer, [r for r in rows if not isinstance(r, Conversation)], add_bos=False))
    return [next(talks) if isinstance(r, Conversation) else next(plain) for r in rows]


def closed_talk(encoded: tuple[list[int], list[int]], ending, tokenizer, note: Note) -> tuple[list[int], list[int]]:
    """A conversation's tokens and mask with the end token of its last answer."""
    ids, mask = encoded
    closed = close(ids, ending, tokenizer)
    if len(closed) > len(ids):
        note(_end_added(tokenizer))
    mask = mask[: len(closed)] + [1] * (len(closed) - len(mask))
    if not mask[-1]:
        note("the end token of the last answer is not trained: the template's generation block ends before it")
    return closed, mask


# ---- checks on token ids --------------------------------------------------------------------------------------------


def check_prompt(ids: list[int], limit: int | None, tokenizer: "PreTrainedTokenizerBase") -> None:
    bos = tokenizer.bos_token_id
    if not [token for token in ids if token != bos]:
        raise BadRow("prompt is empty")
    if ids[:2] == [bos, bos]:
        raise BadRow("prompt starts with BOS twice")
    if limit is not None and len(ids) > limit:
        raise BadRow(f"prompt is longer than max_prompt_length={limit} tokens")


def closed(
    encoded: Encoded, index: int, name: str, tokenizer: "PreTrainedTokenizerBase", ending: Ending, note: Note
) -> list[int]:
    """The ids of one completion with its end token; BadRow if there is nothing before that."""
    ids = encoded.completions[index]
    closed = close(ids, ending, tokenizer)
    if len(closed) == 1:
        raise BadRow(f"{name} is empty")
    if ending.conversational and not {*ending.accepted} & {*ids}:
        note(_end_added(tokenizer))
    if encoded.note:
        note(encoded.note)
    return closed


def _end_added(tokenizer: "PreTrainedTokenizerBase") -> str:
    return f"the chat template does not end an answer with EOS ({tokenizer.eos_token}), which was added"


def controls_of(tokenizer: "PreTrainedTokenizerBase") -> dict[int, str]:
    """The tokens that a text should not have inside: BOS and those that end an answer."""
    ids = [token for token in (tokenizer.bos_token_id, *end_ids(tokenizer)) if token is not None]
    return dict(zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True))


def tokens_inside(ids: list[int], controls: dict[int, str]) -> list[str]:
    return [text for token, text in controls.items() if token in ids]


def note_typed(name: str, tokens: list[str], note: Note) -> None:
    if tokens:
        note(f"{name} has {' and '.join(sorted(tokens))} inside its text")


def check_inside(
    name: str, ids: list[int], controls: dict[int, str], note: Note, tokenizer: "PreTrainedTokenizerBase | None"
) -> None:
    """Of an answer given as text: control tokens inside are noted. BadRow where they are those of further turns that
    somebody has rendered, which would be trained as the policy's; tokenizer: None where they may be there."""
    inside = tokens_inside(ids, controls)
    if inside and tokenizer is not None:
        ends = {*end_ids(tokenizer)}
        first = next((place for place, token in enumerate(ids) if token in ends), len(ids))
        if {*ids[first:]} & (special_ids(tokenizer) - ends - {tokenizer.pad_token_id}):
            raise BadRow(
                f"{name} goes on with a further turn after {controls[ids[first]]}, which would be trained as the "
                "policy's (give messages, or put the turns before the last answer into prompt)"
            )
    note_typed(name, inside, note)


def _check_columns(dataset: "Dataset", taken: tuple[str, ...], source: str) -> None:
    """Columns that the trainer would take for its own."""
    clash = [name for name in taken if name in dataset.column_names]
    if clash:
        raise DataError(f"{source}: the column {clash[0]!r} would be taken for tokens. Rename or remove it.")


def _sequence(ids: list[int], mask: list[int], max_length: int | None, note: Note) -> Columns:
    cut_ids, cut_mask = ids[:max_length], mask[:max_length]
    # The first token of a sequence is predicted from nothing.
    if not any(cut_mask[1:]):
        cut = " after the cut at max_length" if any(mask[1:]) else ""
        raise BadRow(f"no token is trained{cut}")
    if len(cut_ids) < len(ids):
        note(f"sequence is cut at max_length={max_length}")
    return {"input_ids": cut_ids, "completion_mask": cut_mask}
