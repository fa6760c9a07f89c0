"""Ranked lists of answers to a prompt: `prompt`, `completions` and `scores`; and their batches.

A tokenised list has the columns of a pair: the best answer is `chosen_ids`, and `rejected_ids` are all the others, best
first, one after the other; `lengths` says how long each answer is. So what reads pairs (the loop, the reference's
cache) reads lists.
"""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from align.data import checks
from align.data.bad_rows import BadRow, BadRows
from align.data.collate import per_pair, right_pad
from align.data.dialogue import warn_of_dialogues
from align.data.encode import Encoded, check_tokenizer, encode, render_pair
from align.data.ending import ending_of
from align.data.formats import SCORED, DataFormat, columns_of, format_for
from align.data.limits import lengths_of
from align.data.messages import by_role
from align.data.passes import Columns, Note, Recipe, started, tokenized
from align.data.tokenize import check_inside, check_prompt, closed, controls_of, note_typed, tokenize_pairs
from align.data.tokenized import check_room

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

TIED = "answers with the score of another one are left out: a ranking has no ties"


def tokenize_ranked(
    dataset: "Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int | None,
    max_bad_share: float = 0.0,
    source: str = "",
    report: BadRows | None = None,
    num_proc: int | None = None,
) -> "Dataset":
    """Ranked lists: columns `prompt_ids`, `chosen_ids`, `rejected_ids`, `lengths` (as above), `row`, and every other.

    The highest score is the best. Of answers with equal scores the first stays, with a note; a list of fewer than two
    is a bad row, and so is one with two answers of the same tokens. Every answer is cut as `tokenize_pairs` cuts.
    Preference pairs are lists of two.

    Otherwise as `tokenize_prompts`.
    """
    options: dict[str, Any] = {"max_length": max_length, "max_bad_share": max_bad_share, "num_proc": num_proc}
    if not {*SCORED} <= columns_of(dataset, source):
        return lists_of_two(tokenize_pairs(dataset, tokenizer, source=source, report=report, **options))
    report, sample = started(report, source, dataset)
    fmt = format_for(sample, "pairs", report.source)
    if not fmt.conversational:
        warn_of_dialogues(sample, tokenizer, report.source)
    check_tokenizer(tokenizer, fmt.conversational, needs_eos=True)
    ending, controls = ending_of(tokenizer, fmt.conversational), controls_of(tokenizer)

    def prepare(row: Columns, note: Note) -> tuple[tuple, Columns]:
        prompt, answers = ranking_of(row, fmt, note)
        if not fmt.conversational:
            return (prompt, [prompt + answer for answer in answers]), {"prompt": prompt}
        for answer in answers:
            note_typed("an answer", checks.typed_tokens(answer, list(controls.values())), note)
        return render_pair(prompt, answers, tokenizer, checks.template_kwargs(row, tools=True)), {"prompt": prompt}

    def finish(encoded: Encoded, note: Note) -> Columns:
        check_prompt(encoded.prompt_ids, None, tokenizer)
        check_room(encoded.prompt_ids, max_length)
        answers = []
        for index in range(len(encoded.completions)):
            whole = closed(encoded, index, "an answer", tokenizer, ending, note)
            if not fmt.conversational:
                check_inside("an answer", whole[:-1], controls, note, tokenizer)
            answers.append(whole[: None if max_length is None else max_length - len(encoded.prompt_ids)])
            if len(answers[-1]) < len(whole):
                note(f"an answer is cut at max_length={max_length}")
        if len({tuple(answer) for answer in answers}) < len(answers):
            raise BadRow("two answers are the same tokens, cut at max_length where that is set")
        return as_row(encoded.prompt_ids, answers)

    columns = {"prompt": by_role(sample.features["prompt"]), **dict.fromkeys(("prompt_ids", *LISTS), "int32")}
    recipe = Recipe(prepare, partial(encode, tokenizer, add_bos=not fmt.conversational), finish, columns)
    limits = {"use": "ranked", "max_length": max_length}
    return tokenized(dataset, tokenizer, recipe, limits, report, max_bad_share=max_bad_share, num_proc=num_proc)


def ranking_of(row: Columns, fmt: DataFormat, note: Note) -> tuple[Any, list]:
    """(prompt, answers best first), texts or messages; BadRow where there is no ranking."""
    checks.best_and_worst(row)
    scores = row["scores"]
    order = sorted(range(len(scores)), key=lambda i: -scores[i])  # of equal ones the first stays in front
    kept = [i for place, i in enumerate(order) if place == 0 or scores[i] != scores[order[place - 1]]]
    if len(kept) < len(order):
        note(TIED)
    prompt: Any = None
    answers: list = []
    for lower in kept[1:]:  # as pairs with the best one, so that each is checked as a pair's answers are
        pair = {**row, "completions": [row["completions"][i] for i in (kept[0], lower)], "scores": [1.0, 0.0]}
        prompt, best, other = checks.pair_of(pair, fmt)
        answers = [*(answers or [best]), other]
    return prompt, answers


LISTS = ("chosen_ids", "rejected_ids", "lengths")


def as_row(prompt: list[int], answers: list[list[int]]) -> Columns:
    """answers: token ids, best first."""
    rest = [token for answer in answers[1:] for token in answer]
    return {"prompt_ids": prompt, **dict(zip(LISTS, (answers[0], rest, list(map(len, answers))), strict=True))}


def answers_of(row: Columns) -> list[list[int]]:
    """The token ids of a tokenised list's answers, best first."""
    answers, start = [row["chosen_ids"]], 0
    for length in row["lengths"][1:]:
        answers.append(row["rejected_ids"][start : start + length])
        start += length
    return [answer for answer in answers if answer]  # a shorter list has lengths of 0 at its end


def lists_of_two(pairs: "Dataset") -> "Dataset":
    """Tokenised pairs as lists."""
    lengths = np.stack([lengths_of(pairs, name) for name in ("chosen_ids", "rejected_ids")], axis=-1)
    return pairs.add_column("lengths", lengths.tolist())


@dataclass
class RankedCollator:
    """Rows of `tokenize_ranked` to a batch in the form of pairs (`modeling.pairs.Completions`), every sequence padded.

    input_ids, attention_mask: [R, T], prompt and answer of all R answers of the lists. completion_ids, completion_mask,
    completion_sources: [2B, L], the best answers of the B lists and then, in one row for each list, all of its others;
    the sources count through the flattened positions of input_ids. row: [B].
    """

    pad_token_id: int

    def __call__(self, features: list[Columns]) -> dict[str, Tensor]:
        lists = [answers_of(row) for row in features]
        whole = [[*row["prompt_ids"], *answer] for row, own in zip(features, lists, strict=True) for answer in own]
        input_ids, attention_mask = right_pad(whole, self.pad_token_id)
        sources, number = [], 0
        for row, answers in zip(features, lists, strict=True):
            starts = [(number + i) * input_ids.shape[1] + len(row["prompt_ids"]) - 1 for i in range(len(answers))]
            sources.append([[*range(s, s + len(a))] for s, a in zip(starts, answers, strict=True)])
            number += len(answers)
        return {"input_ids": input_ids, "attention_mask": attention_mask, **in_pair_form(features, sources)}

    def tokens_of(self, row: Columns) -> int:
        """Tokens that a list takes in a batch, without the padding to other lists."""
        answers = answers_of(row)
        return len(answers) * (len(row["prompt_ids"]) + max(map(len, answers)))


@dataclass
class SharedRankedCollator:
    """The same in one row, in which the answers of a list share their prompt and nothing is padded.

    input_ids, position_ids: [1, N], every prompt and after it its answers, each without its last token, which predicts
    nothing. attention_mask: [1, 1, B, 1 + K], their lengths (`modeling.shared_prefix`).
    """

    def __call__(self, features: list[Columns]) -> dict[str, Tensor]:
        ids: list[int] = []
        positions: list[int] = []
        lengths, sources = [], []
        for row in features:
            prompt, answers = row["prompt_ids"], answers_of(row)
            last = len(ids) + len(prompt) - 1
            ids += prompt
            positions += range(len(prompt))
            lengths.append(torch.tensor([len(prompt), *(len(answer) - 1 for answer in answers)]))
            own = []
            for answer in answers:
                own.append([last, *range(len(ids), len(ids) + len(answer) - 1)])
                ids += answer[:-1]
                positions += range(len(prompt), len(prompt) + len(answer) - 1)
            sources.append(own)
        return {
            "input_ids": torch.tensor([ids]),
            "position_ids": torch.tensor([positions]),
            "attention_mask": pad_sequence(lengths, batch_first=True)[None, None],
            **in_pair_form(features, sources),
        }

    def tokens_of(self, row: Columns) -> int:
        """Tokens that a list takes in a batch."""
        return len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])


def in_pair_form(features: list[Columns], sources: list[list[list[int]]]) -> dict[str, Tensor]:
    """The completions of lists as those of pairs. sources: of each list the positions that predict its answers."""
    best = [own[0] for own in sources]
    others = [[position for answer in own[1:] for position in answer] for own in sources]
    rows = [torch.tensor(row) for row in (*best, *others)]
    ids = [torch.tensor(row[name]) for name in ("chosen_ids", "rejected_ids") for row in features]
    lengths = torch.tensor([len(row) for row in rows])
    return {
        "completion_ids": pad_sequence(ids, batch_first=True),
        "completion_mask": torch.arange(int(lengths.max())) < lengths[:, None],
        "completion_sources": pad_sequence(rows, batch_first=True),
        **per_pair(features),
    }
