"""Rows and prompts that repeat, and that two sets share: by the texts of all rows, for which nothing is tokenised and
which a sample cannot tell."""

import hashlib
import json
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from align.data import checks
from align.data.bad_rows import BadRow
from align.data.formats import DataFormat
from align.data.messages import with_roles, without_none

if TYPE_CHECKING:
    from datasets import Dataset

ANSWERS = {
    "pairs": ("chosen", "rejected", "completions", "scores"),
    "completions": ("completion", "chosen", "completions", "scores", "messages", "text"),
    "prompts": (),
    "unpaired": ("completion", "label", "chosen", "rejected", "completions", "scores"),
}
"""Columns that make a row, beside its prompt and tools, by what it is used as."""
AT_ONCE = 1000


class Digests(NamedTuple):
    """Of the rows as a whole, [rows], and of the prompts of those that have one, [rows or fewer]: 64 bits each, of
    which two differing rows of a million share one with a probability of 3e-8."""

    whole: np.ndarray
    prompts: np.ndarray


def digests_of(dataset: "Dataset", use: str, fmt: DataFormat) -> Digests:
    """Of every row, usable or not, with `AT_ONCE` of them in memory. Keys that are null make no difference."""
    from tqdm import tqdm

    others = ("tools", *ANSWERS[use])
    names = {"prompt", "conversations", *others, *(ANSWERS["pairs"] if fmt.implicit_prompt else ())}
    given = dataset.select_columns([name for name in dataset.column_names if name in names]).with_format("arrow")
    whole, prompts = bytearray(), bytearray()
    with tqdm(total=len(dataset), unit="row", desc="repeats", disable=None) as bar:
        for batch in given.iter(AT_ONCE):
            for row in map(with_roles, batch.to_pylist()):
                prompt = _prompt(row, fmt)
                asked = b"" if prompt is None else _digest(prompt)
                prompts += asked
                whole += _digest({name: row[name] for name in others if row.get(name) is not None}, asked)
            bar.update(len(batch))
    return Digests(np.frombuffer(whole, np.uint64), np.frombuffer(prompts, np.uint64))


def repeats(rows: Digests) -> dict[str, int]:
    """Rows that are the same as an earlier one, and rows whose prompt is."""
    return {"rows": _repeated(rows.whole), "prompts": _repeated(rows.prompts)}


def leakage(rows: Digests, other: Digests) -> dict[str, int]:
    """How many rows of another split are among these, whole or by their prompt."""
    return {
        "of": len(other.whole),
        "rows": _among(other.whole, rows.whole),
        "prompts": _among(other.prompts, rows.prompts),
    }


def _among(digests: np.ndarray, others: np.ndarray) -> int:
    # sorted: of few numbers above 2^63 that lie close, numpy 2.0 makes a table, and ends in an OverflowError
    return int(np.isin(digests, others, kind="sort").sum())


def _repeated(digests: np.ndarray) -> int:
    return len(digests) - len(np.unique(digests))


def _prompt(row: dict[str, Any], fmt: DataFormat) -> Any:
    """Of demonstrations as one conversation what stands before the first answer. None where there is no prompt."""
    if fmt.implicit_prompt:
        try:
            return checks.prompt_of(row, fmt)
        except BadRow:
            return None
    if fmt.kind != "language_modeling":
        return row["prompt"]
    messages = row["messages"] if fmt.conversational else None
    roles = [isinstance(message, dict) and message.get("role") for message in messages or ()]
    return messages[: roles.index("assistant")] if messages and "assistant" in roles[1:] else None


def _digest(value: Any, before: bytes = b"") -> bytes:
    text = json.dumps(value, sort_keys=True, default=str)
    if "null" in text:  # Arrow gives all messages of a file the keys of each
        text = json.dumps(without_none(value), sort_keys=True, default=str)
    return hashlib.blake2b(before + text.encode(), digest_size=8).digest()
