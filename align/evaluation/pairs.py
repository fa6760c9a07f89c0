"""Preference pairs to evaluate a reward on, as text: any of TRL's preference formats, and RewardBench's."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from align.data.bad_rows import BadRow, BadRows
from align.data.checks import Text, check_pair_numbers, pair_of, template_kwargs
from align.data.formats import DataFormat, columns_of, format_for
from align.data.messages import refuse_calls, with_role
from align.data.rows import source_of
from align.errors import ConfigError
from align.evaluation.rewardbench import is_rewardbench
from align.evaluation.rewardbench2 import Place, is_rewardbench_2, split_row

if TYPE_CHECKING:
    from datasets import Dataset

SUBSET, LABEL = "subset", "chosen_prob"
TEXT_COLUMNS = ("prompt", "chosen", "rejected")


@dataclass
class Pairs:
    """N pairs. rows: their numbers in the source, from 0. columns: its other columns. subsets: one name per pair, or
    None. labels: the probability that the chosen answer is preferred, float [N], or None where it is 1. chat: whether
    plain texts were made into messages. places: of RewardBench 2, whose rows are several pairs each: the number of the
    right and of the wrong answer in its row."""

    source: str
    prompts: list[Text]
    chosen: list[Text]
    rejected: list[Text]
    rows: list[int]
    columns: dict[str, list] = field(default_factory=dict)
    subsets: list[str] | None = None
    labels: np.ndarray | None = None
    chat: bool = False
    places: list[Place] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def rewardbench(self) -> bool:
        return self.subsets is not None and is_rewardbench(set(self.subsets))

    def select(self, indices: Sequence[int]) -> "Pairs":
        """The pairs at these indices, in this order."""

        def at(values: list) -> list:
            return [values[i] for i in indices]

        return Pairs(
            source=self.source,
            prompts=at(self.prompts),
            chosen=at(self.chosen),
            rejected=at(self.rejected),
            rows=at(self.rows),
            columns={name: at(values) for name, values in self.columns.items()},
            subsets=None if self.subsets is None else at(self.subsets),
            labels=None if self.labels is None else self.labels[list(indices)],
            chat=self.chat,
            places=None if self.places is None else at(self.places),
        )

    def answers(self) -> list:
        """What tells the 2N answers apart, chosen first; equal for pairs that share an answer."""
        if self.places is None:
            return list(range(2 * len(self)))
        sides = zip(self.rows, self.places, strict=True)
        found = [((row, "chosen", i), (row, "rejected", j)) for row, (i, j) in sides]
        return [chosen for chosen, _ in found] + [rejected for _, rejected in found]


def read_pairs(
    dataset: "Dataset", *, rows: Sequence[int] | None = None, source: str = "", chat: bool | None = None
) -> tuple[Pairs, BadRows]:
    """The pairs of a preference set and what is wrong with its other rows (`check` has not been called yet).

    rows: the numbers of the rows to read; default: all. A column `subset` names a part of the data that is reported by
    itself. chat: make plain texts into messages, the prompt the user's and the answer the assistant's; default: for
    RewardBench's subsets, whose prompts are meant so. A column `chosen_prob` holds soft labels. A row of RewardBench 2
    is a pair of each right answer beside each wrong one.
    Messages stay messages; columns `tools` and `chat_template_kwargs` go to a reward's chat template. A prompt in plain
    text beside answers that are single assistant messages is a user message.
    """
    source = source_of(dataset, source)
    columns_of(dataset, source)
    lists = is_rewardbench_2(dataset)
    if lists:
        fmt = DataFormat("preference", conversational=False)
    else:
        dataset, fmt = _with_prompt_messages(dataset, format_for(dataset, "pairs", source))
    others = [name for name in dataset.column_names if name not in TEXT_COLUMNS]
    rows = range(len(dataset)) if rows is None else rows
    report, conversational = BadRows(source, total=len(rows)), fmt.conversational or bool(chat)
    numbers: list[int] = []
    places: list[Place] = []
    seen: set[str] = set()
    found: dict[str, list] = {name: [] for name in (*TEXT_COLUMNS, *others)}
    for number, row in zip(rows, dataset.select(rows), strict=True):
        try:
            if SUBSET in others and not isinstance(row[SUBSET], str):
                raise BadRow("subset is missing or is not text")
            parts = split_row(row, seen) if lists else [((0, 0), row)]
            pairs_of_row = [(place, _checked_pair(part, fmt, conversational)) for place, part in parts]
        except BadRow as reason:
            report.add(number, str(reason))
            continue
        for place, texts in pairs_of_row:
            numbers.append(number)
            places.append(place)
            for name, value in (*zip(TEXT_COLUMNS, texts, strict=True), *((name, row[name]) for name in others)):
                found[name].append(value)
    pairs = Pairs(
        source=source,
        prompts=found["prompt"],
        chosen=found["chosen"],
        rejected=found["rejected"],
        rows=numbers,
        columns={name: found[name] for name in others},
        subsets=found[SUBSET] if SUBSET in others else None,
        labels=np.array(found[LABEL], dtype=np.float64) if LABEL in others else None,
        places=places if lists else None,
    )
    if not fmt.conversational and (pairs.rewardbench or lists if chat is None else chat):
        pairs = _as_messages(pairs)
    return pairs, report


def _checked_pair(row: dict[str, Any], fmt: DataFormat, conversational: bool) -> tuple[Text, Text, Text]:
    texts = pair_of(row, fmt)
    if fmt.conversational:
        refuse_calls("answers are compared as texts here", chosen=texts[1], rejected=texts[2])
    check_pair_numbers(row)
    if template_kwargs(row, tools=conversational) and not conversational:
        raise BadRow("chat_template_kwargs would be ignored: plain text goes through no chat template")
    return texts


def _with_prompt_messages(dataset: "Dataset", fmt: DataFormat) -> tuple["Dataset", DataFormat]:
    """RewardBench's other shape: the prompt as text, the answers as lists that start with the assistant's message."""
    if not (fmt.conversational and fmt.implicit_prompt and "prompt" in dataset.column_names):
        return dataset, fmt
    first: Any = next((value for value in dataset["chosen"] if value), None)
    if first is None or not isinstance(first[0], dict) or with_role(first[0]).get("role") != "assistant":
        return dataset, fmt
    prompts = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in dataset["prompt"][:]]
    return dataset.remove_columns("prompt").add_column("prompt", prompts), DataFormat("preference", True)


def _as_messages(pairs: Pairs) -> Pairs:
    def said(role: str, texts: list[str]) -> list[Text]:
        return [[{"role": role, "content": text}] for text in texts]

    pairs.prompts = said("user", pairs.prompts)
    pairs.chosen, pairs.rejected = said("assistant", pairs.chosen), said("assistant", pairs.rejected)
    pairs.chat = True
    return pairs


def text_length(text: Text) -> int:
    """Characters; of messages, those that the assistant wrote."""
    if isinstance(text, str):
        return len(text)
    return sum(len(message["content"]) for message in text if message["role"] == "assistant")


def prompt_keys(pairs: Pairs) -> list[str]:
    """One text per pair, equal where the prompts are: pairs of one prompt are not independent."""
    return [prompt if isinstance(prompt, str) else repr(prompt) for prompt in pairs.prompts]


def sample_places(count: int, limit: int | None, seed: int) -> list[int]:
    """All of `count` indices, or a random sample of `limit` of them, in order."""
    if limit is not None and limit < 1:
        raise ConfigError(f"a sample has at least one pair, got {limit}")
    if limit is None or limit >= count:
        return list(range(count))
    return sorted(random.Random(seed).sample(range(count), limit))
