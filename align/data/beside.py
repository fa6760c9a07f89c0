"""Columns that belong to what is trained and that no format reads: said, or the rows would be trained without them."""

import json
import logging
from typing import TYPE_CHECKING, Any

from align.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

SYSTEM = ("system", "system_prompt")
INPUT = "input"
LOOKED_AT = 100
TEXTS = ("prompt", "messages", "conversations", "chosen")


def look_beside(dataset: "Dataset", source: str) -> None:
    """A warning for the column of system messages, or of inputs to an instruction, that is left out; DataError for
    prompts that are lists of turns as JSON (Arena's)."""
    texts = [name for name in TEXTS if name in dataset.column_names]
    others = [name for name in (*SYSTEM, INPUT) if name in dataset.column_names]
    if not texts or not {"prompt", *others} & {*dataset.column_names}:
        return
    names = {texts[0], *others}
    rows = [dict(zip(names, row, strict=True)) for row in _first(dataset, names)]
    if texts[0] == "prompt" and rows and all(_turns(row["prompt"]) for row in rows):
        raise DataError(
            f"{source}: the prompts are lists of turns as JSON ({rows[0]['prompt']!r:.60}), and would be read as text: "
            "make messages of them, with role and content (docs/data.md, published sets)"
        )
    for name in others:
        left_out = [row for row in rows if isinstance(row[name], str) and not _holds(row[texts[0]], row[name].strip())]
        if left_out:
            how = f"--system_column {name}" if name in SYSTEM else f"--plain --rename prompt+{name}=prompt"
            logger.warning(
                "%s: the column %r (%s) is not a part of what is trained; `align data convert %s --to FILE.jsonl %s` "
                "makes it one",
                source,
                name,
                f"{left_out[0][name]!r:.60}",
                source,
                how,
            )


def _first(dataset: "Dataset", names: set[str]) -> list[tuple]:
    columns = dataset.select_columns([*names]).with_format(None)[:LOOKED_AT]
    return list(zip(*(columns[name] for name in names), strict=True))


def _turns(value: Any) -> bool:
    if not isinstance(value, str) or not value.startswith("[") or not value.endswith("]"):
        return False
    try:
        turns = json.loads(value)
    except ValueError:
        return False
    return isinstance(turns, list) and bool(turns) and all(turn is None or isinstance(turn, str) for turn in turns)


def _holds(value: Any, text: str) -> bool:
    """Whether the text is in a text or in one of the messages."""
    if isinstance(value, list):
        said = [message.get("content", message.get("value")) for message in value if isinstance(message, dict)]
        return any(isinstance(part, str) and text in part for part in said)
    return not isinstance(value, str) or text in value
