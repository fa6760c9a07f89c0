"""From rows of text to token ids, every row checked before anything trains.

One rule makes training and rollouts agree: `prompt_ids` are the tokens of the prompt alone, exactly what a rollout
starts from; a completion is the tokens after these. It is tokenised in its context; where the tokenizer would merge
the end of the prompt with the start of the completion into one token, it is tokenised apart, and the row is noted.

A plain text gets BOS in front if the tokenizer puts one there; a chat template brings its own. A completion ends with
exactly one EOS, unless the length limit cut it. Masks come from lengths and positions, never from token ids, so a
tokenizer whose pad token is its EOS still trains the EOS.
"""

import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from align.data import checks
from align.data.bad_rows import BadRow, BadRows
from align.data.encode import Encoded, check_tokenizer, close, encode, encode_conversation, render, render_pair
from align.data.formats import DataFormat, format_for
from align.data.rows import source_of

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

Columns = dict[str, Any]
Note = Callable[[str], None]


def tokenize_prompts(
    dataset: "Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_prompt_length: int | None,
    max_bad_share: float = 0.0,
    source: str = "",
    report: BadRows | None = None,
) -> "Dataset":
    """Prompts for rollouts: columns `prompt_ids`, `prompt` (text or messages), `row`, and every other column.

    A preference set gives its prompts. A prompt longer than `max_prompt_length` tokens is a bad row; it is never cut.
    source: what to call the data in messages. report: receives what was found. `row` counts from 0; a whole-number
    column `row` that the data has already is kept, so that rows selected from a larger set keep their numbers.

    Raises DataError if more than `max_bad_share` of the rows are bad, or none is left.
    """
    report = _start(report, source, dataset)
    fmt = format_for(dataset, "prompts", report.source)
    check_tokenizer(tokenizer, fmt.conversational, needs_eos=False)

    def prepare(row: Columns) -> tuple[tuple, Columns]:
        prompt, options = checks.prompt_of(row, fmt), checks.template_kwargs(row)
        text = render(prompt, tokenizer, options, answer_next=True) if fmt.conversational else prompt
        return (text, []), {"prompt": prompt}

    def finish(encoded: Encoded, note: Note) -> Columns:
        _check_prompt(encoded.prompt_ids, max_prompt_length, tokenizer)
        _note_specials(encoded.prompt_ids[1:], "prompt", tokenizer, fmt.conversational, note)
        return {"prompt_ids": encoded.prompt_ids}

    return _tokenize(
        dataset,
        prepare,
        lambda rows: encode(tokenizer, rows, add_bos=not fmt.conversational),
        finish,
        columns={"prompt": dataset.features["chosen" if fmt.implicit_prompt else "prompt"], "prompt_ids": "int32"},
        report=report,
        max_bad_share=max_bad_share,
    )


def tokenize_completions(
    dataset: "Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int | None,
    max_bad_share: float = 0.0,
    source: str = "",
    report: BadRows | None = None,
) -> "Dataset":
    """Demonstrations for SFT: columns `input_ids`, `completion_mask` (1 on trained tokens), `row`, and every other.

    Trained are: the completion of prompt-completion rows; the chosen completion of preference rows; every token of
    `text`; the assistant's messages of `messages`. Longer sequences are cut at `max_length` tokens and counted; a row
    that would keep no trained token is bad.

    Otherwise as `tokenize_prompts`.
    """
    report = _start(report, source, dataset)
    fmt = format_for(dataset, "completions", report.source)
    check_tokenizer(tokenizer, fmt.conversational, needs_eos=True)
    columns = {"input_ids": "int32", "completion_mask": "int8"}
    whole = fmt.kind == "language_modeling"
    if whole and fmt.conversational:
        how = _conversations(tokenizer, fmt, max_length)
        return _tokenize(dataset, how[0], list, how[1], columns=columns, report=report, max_bad_share=max_bad_share)

    def prepare(row: Columns) -> tuple[tuple, Columns]:
        if whole:
            return ("", [checks.text_of(row, fmt)]), {}
        prompt, completion = checks.completion_of(row, fmt)
        if not fmt.conversational:
            return (prompt, [completion]), {}
        return render_pair(prompt, [completion], tokenizer, checks.template_kwargs(row)), {}

    def finish(encoded: Encoded, note: Note) -> Columns:
        prompt_ids = encoded.prompt_ids
        if not whole:
            _check_prompt(prompt_ids, None, tokenizer)
            _check_room(prompt_ids, max_length)
        completion = _closed(encoded, 0, "text" if whole else "completion", tokenizer, fmt.conversational, note)
        mask = [0] * len(prompt_ids) + [1] * len(completion)
        return _sequence(prompt_ids + completion, mask, max_length, note)

    return _tokenize(
        dataset,
        prepare,
        lambda rows: encode(tokenizer, rows, add_bos=not fmt.conversational),
        finish,
        columns=columns,
        report=report,
        max_bad_share=max_bad_share,
    )


def _conversations(tokenizer, fmt: DataFormat, max_length: int | None):
    """`prepare` and `finish` of whole conversations, whose template tells the assistant's tokens."""

    def prepare(row: Columns) -> tuple[tuple, Columns]:
        messages, options = checks.text_of(row, fmt), checks.template_kwargs(row)
        return encode_conversation(messages, tokenizer, options), {}

    def finish(encoded: tuple[list[int], list[int]], note: Note) -> Columns:
        ids, mask = encoded
        closed = close(ids, tokenizer)
        if len(closed) > len(ids):
            note(_eos_added(tokenizer))
        mask = mask[: len(closed)] + [1] * (len(closed) - len(mask))
        if not mask[-1]:
            note("the EOS of the last answer is not trained: the template's generation block ends before it")
        return _sequence(closed, mask, max_length, note)

    return prepare, finish


def tokenize_pairs(
    dataset: "Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int | None,
    max_prompt_length: int | None = None,
    max_bad_share: float = 0.0,
    source: str = "",
    report: BadRows | None = None,
) -> "Dataset":
    """Preference pairs: columns `prompt_ids`, `chosen_ids`, `rejected_ids`, `row`, and every other column.

    Prompt and completion together are at most `max_length` tokens: a longer completion is cut (it then has no EOS) and
    counted. A prompt that is longer than `max_prompt_length`, or leaves no room for a completion, is a bad row; so is a
    pair whose two completions are the same tokens, or whose `margin` or `chosen_prob` is no finite number or no
    probability. An implicit prompt is taken out of `chosen` and `rejected`.

    Otherwise as `tokenize_prompts`.
    """
    report = _start(report, source, dataset)
    fmt = format_for(dataset, "pairs", report.source)
    check_tokenizer(tokenizer, fmt.conversational, needs_eos=True)

    def prepare(row: Columns) -> tuple[tuple, Columns]:
        prompt, chosen, rejected = checks.pair_of(row, fmt)
        checks.check_pair_numbers(row)
        texts = prompt, [chosen, rejected]
        if fmt.conversational:
            texts = render_pair(prompt, [chosen, rejected], tokenizer, checks.template_kwargs(row))
        return texts, {"prompt": prompt, "chosen": chosen, "rejected": rejected}

    def finish(encoded: Encoded, note: Note) -> Columns:
        _check_prompt(encoded.prompt_ids, max_prompt_length, tokenizer)
        _check_room(encoded.prompt_ids, max_length)
        room = None if max_length is None else max_length - len(encoded.prompt_ids)
        ids, cut = {}, False
        for place, name in enumerate(("chosen", "rejected")):
            whole = _closed(encoded, place, name, tokenizer, fmt.conversational, note)
            ids[f"{name}_ids"] = whole[:room]
            if len(whole) > len(whole[:room]):
                cut = True
                note(f"{name} is cut at max_length={max_length}")
        if ids["chosen_ids"] == ids["rejected_ids"]:
            raise BadRow("chosen and rejected are the same tokens" + (" after the cut at max_length" if cut else ""))
        return {"prompt_ids": encoded.prompt_ids, **ids}

    return _tokenize(
        dataset,
        prepare,
        lambda rows: encode(tokenizer, rows, add_bos=not fmt.conversational),
        finish,
        columns={
            "prompt": dataset.features["chosen" if fmt.implicit_prompt else "prompt"],
            "prompt_ids": "int32",
            "chosen_ids": "int32",
            "rejected_ids": "int32",
        },
        report=report,
        max_bad_share=max_bad_share,
    )


# ---- one pass over the rows -----------------------------------------------------------------------------------------


def _start(report: BadRows | None, source: str, dataset: "Dataset") -> BadRows:
    report = BadRows() if report is None else report
    report.source = source_of(dataset, source)
    report.total = len(dataset)
    return report


def _tokenize(
    dataset: "Dataset",
    prepare: Callable[[Columns], tuple[tuple, Columns]],
    encode_rows: Callable[[list[tuple]], list],
    finish: Callable[[Any, Note], Columns],
    *,
    columns: dict[str, Any],
    report: BadRows,
    max_bad_share: float,
) -> "Dataset":
    """prepare(row) -> (texts, columns to replace); encode_rows(texts of a batch); finish(encoded, note) -> new columns.

    prepare and finish raise BadRow. columns: the feature of each new or replaced column ("int32": a list of these).
    """
    from datasets import Features, List, Value

    new = {name: List(Value(kind)) if isinstance(kind, str) else kind for name, kind in columns.items()}
    features = Features({**dataset.features, **new, "row": Value("int64")})
    numbers = dataset.features.get("row")
    numbered = isinstance(numbers, Value) and numbers.dtype.startswith("int")

    def tokenize_batch(batch: Columns, indices: list[int]) -> Columns:
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        ready, texts, kept = [], [], []
        for index, row in zip(indices, rows, strict=True):
            row["row"] = row["row"] if numbered else index
            try:
                text, replaced = prepare(row)
            except BadRow as reason:
                report.add(row["row"], str(reason))
                continue
            ready.append({**row, **replaced})
            texts.append(text)
        for row, encoded in zip(ready, encode_rows(texts), strict=True):
            notes: dict[str, None] = {}
            try:
                kept.append({**row, **finish(encoded, notes.setdefault)})
            except BadRow as reason:
                report.add(row["row"], str(reason))
                continue
            for message in notes:
                report.note(row["row"], message)
        return {name: [row[name] for row in kept] for name in features}

    # In memory and never from the cache: the cache would not know of a change in this code.
    tokenized = dataset.with_format(None).map(
        tokenize_batch,
        batched=True,
        with_indices=True,
        features=features,
        remove_columns=dataset.column_names,
        keep_in_memory=True,
        load_from_cache_file=False,
        new_fingerprint=uuid.uuid4().hex,
        desc=f"Tokenising {report.source}",
    )
    report.check(max_bad_share)
    return tokenized


# ---- checks on token ids --------------------------------------------------------------------------------------------


def _check_prompt(ids: list[int], limit: int | None, tokenizer: "PreTrainedTokenizerBase") -> None:
    bos = tokenizer.bos_token_id
    if not [token for token in ids if token != bos]:
        raise BadRow("prompt is empty")
    if ids[:2] == [bos, bos]:
        raise BadRow("prompt starts with BOS twice")
    if limit is not None and len(ids) > limit:
        raise BadRow(f"prompt is longer than max_prompt_length={limit} tokens")


def _check_room(prompt_ids: list[int], max_length: int | None) -> None:
    if max_length is not None and len(prompt_ids) >= max_length:
        raise BadRow(f"prompt leaves no room for a completion within max_length={max_length} tokens")


def _closed(
    encoded: Encoded, place: int, name: str, tokenizer: "PreTrainedTokenizerBase", conversational: bool, note: Note
) -> list[int]:
    """The ids of one completion with its EOS; BadRow if there is nothing before the EOS."""
    ids = encoded.completions[place]
    closed = close(ids, tokenizer)
    if len(closed) == 1:
        raise BadRow(f"{name} is empty")
    if conversational and tokenizer.eos_token_id not in ids:
        note(_eos_added(tokenizer))
    _note_specials(closed[:-1], name, tokenizer, conversational, note)
    if encoded.apart:
        note("prompt and completion would merge into one token, so the completion is tokenised apart")
    return closed


def _eos_added(tokenizer: "PreTrainedTokenizerBase") -> str:
    return f"the chat template does not end an answer with EOS ({tokenizer.eos_token}), which was added"


def _note_specials(ids: list[int], name: str, tokenizer: "PreTrainedTokenizerBase", talk: bool, note: Note) -> None:
    """BOS or EOS where a text does not have them; a chat template may write EOS after every turn."""
    found = {tokenizer.bos_token_id, tokenizer.eos_token_id}.intersection(ids) - {None}
    if talk:
        found.discard(tokenizer.eos_token_id)
    if found:
        note(f"{name} has {' and '.join(sorted(tokenizer.convert_ids_to_tokens(sorted(found))))} inside its text")


def _sequence(ids: list[int], mask: list[int], max_length: int | None, note: Note) -> Columns:
    cut_ids, cut_mask = ids[:max_length], mask[:max_length]
    # The first token of a sequence is predicted from nothing.
    if not any(cut_mask[1:]):
        cut = " after the cut at max_length" if any(mask[1:]) else ""
        raise BadRow(f"no token is trained{cut}")
    if len(cut_ids) < len(ids):
        note(f"sequence is cut at max_length={max_length}")
    return {"input_ids": cut_ids, "completion_mask": cut_mask}
