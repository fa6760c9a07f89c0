"""The prompts that `align generate` and `align compare` answer: a text file's lines or any data's, as a chat or not."""

from pathlib import Path
from typing import TYPE_CHECKING

from align.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset


def read_prompts(path: str, split: str = "train") -> "Dataset":
    """Rows with prompts: a .txt file, one prompt a line (empty lines left out), or what `load_rows` reads."""
    from datasets import Dataset

    from align.data import load_rows

    if not path.endswith(".txt"):
        return load_rows(path, split)
    if not Path(path).is_file():
        raise DataError(f"{path} does not exist")
    lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").split("\n")]  # no other ends a line
    if not any(lines):
        raise DataError(f"{path} holds no prompt: one stands on each line")
    return Dataset.from_list([{"prompt": line} for line in lines if line])


def as_chat(rows: "Dataset", *, system: str | None, source: str) -> "Dataset":
    """Prompts in plain text as a user's message each; `system` before every conversation that has none.

    A preference set whose prompt is the beginning of its pairs must hold messages already.
    """
    from align.data.dialogue import SHARE, dialogue_share
    from align.data.formats import format_for

    fmt = format_for(rows, "prompts", source)
    first = [{"role": "system", "content": system}] if system else []
    if not fmt.conversational:
        if dialogue_share(rows) >= SHARE:
            raise DataError(
                f"{source} holds dialogues as text (Human: ... Assistant: ...): convert them with `align data convert "
                f"{source} --to FILE.jsonl`, or give them to the model as they are with --no-chat"
            )
        if fmt.implicit_prompt:
            raise DataError(f"{source} has no column prompt, and holds plain text: give it as it is with --no-chat")
        pairs = [name for name in ("chosen", "rejected") if name in rows.column_names]
        rows = rows.remove_columns(pairs)
        return rows.map(
            lambda row: {"prompt": [*first, {"role": "user", "content": row["prompt"]}]}, load_from_cache_file=False
        )
    if not first:
        return rows
    name = "chosen" if fmt.implicit_prompt else "prompt"
    if fmt.implicit_prompt:
        raise DataError(f"{source} has no column prompt for --system to stand in")

    def with_system(row: dict) -> dict:
        return {name: row[name] if row[name][0]["role"] == "system" else first + row[name]}

    return rows.map(with_system, load_from_cache_file=False)
