"""Pairs whose answers call tools: what the tools said stays in the sequence, and is not trained.

Beside the columns of `tokenize_pairs` there are `chosen_mask` and `rejected_mask`, 1 on the tokens of an answer that
the policy wrote.
"""

from functools import partial
from typing import TYPE_CHECKING, Any

from align.data import checks
from align.data.bad_rows import BadRow, BadRows
from align.data.encode import (
    PARTED,
    Conversation,
    check_tokenizer,
    common,
    encode_conversations,
    ids_of,
    render,
    render_conversation,
)
from align.data.ending import ending_of
from align.data.formats import format_for
from align.data.passes import Columns, Note, Recipe, started, tokenized
from align.data.tokenize import check_prompt, closed_talk, controls_of, note_typed, pair_columns
from align.data.tokenized import MASKS, cut_pair

if TYPE_CHECKING:
    from datasets import Dataset

Talk = tuple[list[int], list[int]]
"""Ids, and 1 where they are the assistant's."""


def calls_tools(sample: "Dataset") -> bool:
    """Whether pairs are of messages and have the column `tools`: the rows that `tokenize_turns` is for."""
    columns = {*sample.column_names}
    return "tools" in columns and {"chosen", "rejected"} <= columns and format_for(sample, "pairs").conversational


def tokenize_turns(
    dataset: "Dataset",
    tokenizer: Any,
    *,
    max_length: int | None,
    max_bad_share: float = 0.0,
    source: str = "",
    report: BadRows | None = None,
    num_proc: int | None = None,
) -> "Dataset":
    """As `tokenize_pairs`; an answer begins and ends with an assistant message, and messages of others in between are
    masked."""
    report, sample = started(report, source, dataset, streams=True)
    fmt = format_for(sample, "pairs", report.source)
    check_tokenizer(tokenizer, True, needs_eos=True)
    ending, controls = ending_of(tokenizer, True), controls_of(tokenizer)

    def prepare(row: Columns, note: Note) -> tuple[Any, Columns]:
        prompt, *answers = checks.pair_of(row, fmt, scored=True)
        checks.check_pair_numbers(row, note)
        options = checks.template_kwargs(row, tools=True)
        for name, answer in zip(("chosen", "rejected"), answers, strict=True):
            note_typed(name, checks.typed_tokens(answer, list(controls.values())), note)
        talks = [render_conversation(prompt + answer, tokenizer, options, len(prompt)) for answer in answers]
        return (render(prompt, tokenizer, options, answer_next=True), talks), {
            "prompt": prompt,
            "chosen": answers[0],
            "rejected": answers[1],
        }

    def finish(encoded: tuple[list[int], list[Talk]], note: Note) -> Columns:
        prompt, talks = encoded
        check_prompt(prompt, None, tokenizer)
        talks = [closed_talk(talk, ending, tokenizer, note) for talk in talks]
        shared = min(common(prompt, ids) for ids, _ in talks)
        if shared < len(prompt):
            note(PARTED)
        made: Columns = {"prompt_ids": prompt[:shared]}
        for name, (ids, mask) in zip(("chosen", "rejected"), talks, strict=True):
            made |= {f"{name}_ids": ids[shared:], f"{name}_mask": mask[shared:]}
        if any(sum(mask[:shared]) for _, mask in talks):
            raise BadRow("a part of an answer is in the prompt that both share")
        return cut_pair(made, max_length, note)

    columns = pair_columns(sample, fmt) | dict.fromkeys(MASKS, "int8")
    recipe = Recipe(prepare, partial(_encode, tokenizer, ending), finish, columns)
    limits = {"use": "turns", "max_length": max_length}
    return tokenized(dataset, tokenizer, recipe, limits, report, max_bad_share=max_bad_share, num_proc=num_proc)


def _encode(tokenizer, ending, rows: list[tuple[str, list[Conversation]]]) -> list[tuple[list[int], list[Talk]]]:
    talks = encode_conversations(tokenizer, [talk for _, both in rows for talk in both], ending)
    prompts = ids_of(tokenizer, [prompt for prompt, _ in rows])
    return [(prompt, talks[2 * i : 2 * i + 2]) for i, prompt in enumerate(prompts)]
