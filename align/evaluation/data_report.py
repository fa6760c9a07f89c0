"""`align data show`: what is in a dataset: faults, lengths, what limits would cost, repeats, leakage between splits."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from align.data.bad_rows import BadRows
from align.data.describe import describe_example
from align.data.dialogue import unused_template
from align.data.formats import detect_format, format_for
from align.data.rows import source_of
from align.data.tokenize import tokenize_completions, tokenize_pairs, tokenize_prompts
from align.data.unpaired import tokenize_unpaired
from align.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

USES = ("pairs", "completions", "prompts", "unpaired")
IDS = {
    "pairs": ("prompt_ids", "chosen_ids", "rejected_ids"),
    "completions": ("input_ids", "completion_mask"),
    "prompts": ("prompt_ids",),
    "unpaired": ("prompt_ids", "completion_ids", "label"),
}
BINS = 12
QUANTILES = (0.0, 0.5, 0.9, 0.99, 1.0)
TEMPLATE = "data.html.j2"


class Row(NamedTuple):
    """Of one tokenised row: tokens of its longest sequence; the smallest limit that leaves something to train on is
    `needed + 1`; digests of the prompt (None without one) and of the whole row."""

    tokens: int
    needed: int
    prompt: bytes | None
    whole: bytes


def data_report(
    dataset: "Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    use: str | None = None,
    limits: Sequence[int] = (),
    against: "Dataset | None" = None,
    examples: int = 2,
) -> dict[str, Any]:
    """Plain values by name, as `lines` and the page show them.

    use: "pairs", "completions", "prompts" or "unpaired" (labelled answers); by default what the columns are for.
    limits: of `max_length`, or of `max_prompt_length` for prompts. against: another split, which should share no row
    and no prompt with this one. Raises DataError where no row can be used.
    """
    use = use or _use_of(dataset)
    report = BadRows()
    tokenised = _tokenised(dataset, tokenizer, use, report)
    rows = list(_rows(tokenised, use))
    tokens, needed = np.array([row.tokens for row in rows]), np.array([row.needed for row in rows])
    fmt = detect_format(dataset) if use == "unpaired" else format_for(dataset, use)
    counts, edges = np.histogram(tokens, bins=min(BINS, int(tokens.max())), range=(0, int(tokens.max()) + 1))
    found: dict[str, Any] = {
        "source": source_of(dataset),
        "use": use,
        "format": f"{fmt.kind}, {'messages' if fmt.conversational else 'text'}"
        + (", the prompt taken from the pair" if fmt.implicit_prompt else "")
        + (_labels(tokenised["label"]) if use == "unpaired" else ""),
        "columns": list(dataset.column_names),
        "rows": len(dataset),
        "usable": len(rows),
        "dropped": {text: (len(at), at[:5]) for text, at in report.reasons.items()},
        "noted": {text: (len(at), at[:5]) for text, at in report.notes.items()},
        "tokens": int(tokens.sum()),
        "quantiles": {share: int(np.quantile(tokens, share)) for share in QUANTILES},
        "histogram": [(int(low), int(high), int(n)) for low, high, n in zip(edges, edges[1:], counts, strict=False)],
        "limits": {limit: _at(limit, tokens, needed) for limit in limits},
        "repeats": _repeats(rows),
        "template": unused_template(dataset, tokenizer),
        "examples": [describe_example(tokenised[i], tokenizer, use) for i in range(min(examples, len(rows)))],
    }
    if against is not None:
        other = list(_rows(_tokenised(against, tokenizer, use, BadRows()), use))
        found["leakage"] = _leakage(rows, other)
    return found


def _use_of(dataset: "Dataset") -> str:
    kinds = {"preference": "pairs", "prompt_only": "prompts"}
    kind = detect_format(dataset).kind
    if kind == "prompt_completion" and "label" in dataset.column_names:
        return "unpaired"
    return kinds.get(kind, "completions")


def _labels(labels: Sequence[bool]) -> str:
    return f"; {sum(labels)} desirable, {len(labels) - sum(labels)} undesirable"


def _tokenised(dataset: "Dataset", tokenizer, use: str, report: BadRows) -> "Dataset":
    if use == "pairs":
        scored = "tools" in dataset.column_names  # in whose answers tools may speak
        return tokenize_pairs(dataset, tokenizer, max_length=None, max_bad_share=1.0, report=report, scored=scored)
    if use == "completions":
        return tokenize_completions(dataset, tokenizer, max_length=None, max_bad_share=1.0, report=report)
    if use == "prompts":
        return tokenize_prompts(dataset, tokenizer, max_prompt_length=None, max_bad_share=1.0, report=report)
    if use == "unpaired":
        return tokenize_unpaired(dataset, tokenizer, max_length=None, max_bad_share=1.0, report=report)
    raise DataError(f"data are used as {', '.join(USES)}, not as {use!r}")


def _rows(tokenised: "Dataset", use: str) -> Iterator[Row]:
    for row in tokenised.select_columns(list(IDS[use])):
        parts = [row[name] for name in IDS[use]]
        if use == "completions":
            ids, mask = parts
            start = mask.index(1)
            yield Row(len(ids), max(start, 1), _digest(ids[:start]) if start else None, _digest(ids, mask))
            continue
        prompt = parts[0]
        if use == "prompts":
            yield Row(len(prompt), len(prompt) - 1, _digest(prompt), _digest(prompt))
            continue
        if use == "unpaired":
            tokens = len(prompt) + len(parts[1])
            yield Row(tokens, len(prompt), _digest(prompt), _digest(prompt, parts[1], [parts[2]]))
            continue
        chosen, rejected = parts[1:]
        shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
        shared = min(len(chosen), len(rejected)) if shared is None else shared
        tokens = len(prompt) + max(len(chosen), len(rejected))
        yield Row(tokens, len(prompt) + shared, _digest(prompt), _digest(*parts))


def _digest(*parts: Sequence[int]) -> bytes:
    digest = hashlib.blake2b(digest_size=12)
    for ids in parts:
        digest.update(np.asarray([len(ids), *ids], dtype=np.int64).tobytes())
    return digest.digest()


def _at(limit: int, tokens: np.ndarray, needed: np.ndarray) -> dict[str, int]:
    """Rows that a limit drops (nothing that tells the answers apart, or nothing to train on, is left) and cuts."""
    dropped = needed >= limit
    return {"dropped": int(dropped.sum()), "cut": int(((tokens > limit) & ~dropped).sum())}


def _repeats(rows: list[Row]) -> dict[str, int]:
    """Rows that are the same as an earlier one, and rows whose prompt is."""
    prompts = [row.prompt for row in rows if row.prompt is not None]
    return {"rows": len(rows) - len({row.whole for row in rows}), "prompts": len(prompts) - len(set(prompts))}


def _leakage(rows: list[Row], other: list[Row]) -> dict[str, int]:
    """How many rows of the other split are in this one, whole or by their prompt."""
    whole, prompts = {row.whole for row in rows}, {row.prompt for row in rows if row.prompt is not None}
    return {
        "of": len(other),
        "rows": sum(row.whole in whole for row in other),
        "prompts": sum(row.prompt in prompts for row in other if row.prompt is not None),
    }


# ---- shown ----------------------------------------------------------------------------------------------------------


def lines(found: dict[str, Any]) -> list[str]:
    """The report for a terminal."""
    say = [
        f"{found['source']}: {found['rows']} rows, {found['usable']} usable as {found['use']} ({found['format']})",
        f"columns: {', '.join(found['columns'])}",
    ]
    if found["template"]:
        say.append(f"note: {found['template']}")
    for name in ("dropped", "noted"):
        for text, (count, at) in found[name].items():
            say.append(f"{name}: {text}: {count} (row{'s' * (count > 1)} {', '.join(map(str, at))})")
    quantiles = ", ".join(f"{_name(share)} {value}" for share, value in found["quantiles"].items())
    say += ["", f"tokens of the longest sequence of a row: {quantiles}; {found['tokens']} in all"]
    most = max(count for *_, count in found["histogram"])
    for low, high, count in found["histogram"]:
        say.append(f"  {low:>7} - {high:<7} {count:>8} {'#' * round(40 * count / most)}".rstrip())
    if found["limits"]:
        name = "max_prompt_length" if found["use"] == "prompts" else "max_length"
        say += ["", f"{name}: rows dropped, rows cut"]
        say += [f"  {limit:>7} {at['dropped']:>8} {at['cut']:>8}" for limit, at in found["limits"].items()]
    repeats = found["repeats"]
    say += ["", f"repeats: {repeats['rows']} rows are the same as an earlier one, {repeats['prompts']} prompts are"]
    if "leakage" in found:
        at = found["leakage"]
        shared = f"{at['rows']} are here, {at['prompts']} by their prompt"
        say.append(f"leakage: of {at['of']} rows of the other split {shared}")
    for example in found["examples"]:
        say += ["", example]
    return say


def _name(share: float) -> str:
    return {0.0: "least", 0.5: "median", 1.0: "most"}.get(share, f"{share:.0%}")


def write_page(path: str | Path, found: dict[str, Any]) -> Path:
    """The same as one HTML file."""
    from align.evaluation.report import render_page

    quantiles = [(_name(share), value) for share, value in found["quantiles"].items()]
    most = max(count for *_, count in found["histogram"])
    return render_page(Path(path), TEMPLATE, f=found, quantiles=quantiles, most=most)
