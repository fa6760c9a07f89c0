"""One tokenised row as text, with what is trained marked: what `--dry-run` prints."""

from itertools import groupby
from typing import TYPE_CHECKING, Any

from align.data.ending import end_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST = 2000  # characters shown of one part


def describe_example(tokenized_row: dict[str, Any], tokenizer: "PreTrainedTokenizerBase", kind: str) -> str:
    """Plain text: each part with its token count, decoded with special tokens, marked `trained` or `context`.

    kind: "prompts", "completions", "pairs", "ranked" or "unpaired", after the function that made the row. A line break
    in the text is shown as \\n at the end of a line. Print it without rich markup: the text may hold square brackets.
    """
    row = tokenized_row
    if kind == "prompts":
        parts = [("prompt", row["prompt_ids"], "context")]
        trained = "the rollouts start here"
    elif kind == "pairs":
        parts = [("prompt", row["prompt_ids"], "context")]
        for name in ("chosen", "rejected"):
            ids = row[f"{name}_ids"]
            runs = groupby(zip(row.get(f"{name}_mask") or [1] * len(ids), ids, strict=True), key=lambda item: item[0])
            parts += [(name, [token for _, token in run], "trained" if mask else "context") for mask, run in runs]
        counts = [sum(row.get(f"{name}_mask") or [1] * len(row[f"{name}_ids"])) for name in ("chosen", "rejected")]
        trained = f"{counts[0]} and {counts[1]} trained"
    elif kind == "ranked":
        from align.data.ranked import answers_of

        parts = [("prompt", row["prompt_ids"], "context")]
        parts += [(f"answer {place}", ids, "trained") for place, ids in enumerate(answers_of(row), 1)]
        trained = f"{' and '.join(str(len(ids)) for _, ids, _ in parts[1:])} trained"
    elif kind == "unpaired":
        parts = [("prompt", row["prompt_ids"], "context"), ("completion", row["completion_ids"], "trained")]
        trained = f"{len(row['completion_ids'])} trained, {'desirable' if row['label'] else 'undesirable'}"
    elif kind == "completions":
        runs = groupby(zip(row["completion_mask"], row["input_ids"], strict=True), key=lambda item: item[0])
        parts = [("", [token for _, token in run], "trained" if mask else "context") for mask, run in runs]
        trained = f"{sum(row['completion_mask'])} trained"
    else:
        raise ValueError(f"kind is 'prompts', 'completions', 'pairs', 'ranked' or 'unpaired', not {kind!r}")
    total = sum(len(ids) for _, ids, _ in parts)
    ends = end_ids(tokenizer)
    lines = [f"row {row['row']}: {total} tokens, {trained}"]
    for name, ids, mark in parts:
        ending = ""
        if mark == "trained" and ends:
            closed = ids[-1] in ends
            ending = f", ends with {tokenizer.convert_ids_to_tokens(ids[-1])}" if closed else ", no end token"
        lines.append(f"{name or mark} ({len(ids)} tokens{ending})")
        lines += [f"  {mark} | {line}" for line in _lines(tokenizer.decode(ids, skip_special_tokens=False))]
    return "\n".join(lines)


def _lines(text: str) -> list[str]:
    if len(text) > LONGEST:
        left_out = len(text) - LONGEST
        text = f"{text[: LONGEST // 2]} [... {left_out} characters left out ...] {text[-LONGEST // 2 :]}"
    return text.replace("\n", "\\n\n").splitlines() or [""]
