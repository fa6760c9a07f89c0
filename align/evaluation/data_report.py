"""`align data show`: what is in a dataset: faults, lengths, what limits would cost, repeats, leakage between splits."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from align.data.bad_rows import BadRows
from align.data.describe import describe_example
from align.data.dialogue import unused_template
from align.data.formats import DataFormat, detect_format, format_for
from align.data.passes import has_numbers
from align.data.rows import source_of
from align.data.tokenize import tokenize_completions, tokenize_pairs, tokenize_prompts
from align.data.unpaired import tokenize_unpaired
from align.errors import DataError
from align.evaluation.data_repeats import digests_of, leakage, repeats

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

USES = ("pairs", "completions", "prompts", "unpaired")
SEED = 0  # of the sample
COLUMNS = {
    "pairs": ("prompt_ids", "chosen_ids", "rejected_ids"),
    "completions": ("completion_mask",),
    "prompts": ("prompt_ids",),
    "unpaired": ("prompt_ids", "completion_ids"),
}
"""Whose lengths are looked at; of a mask, also where it begins."""
AT_ONCE = 1000  # rows in memory
BINS = 12
QUANTILES = (0.0, 0.5, 0.9, 0.99, 1.0)
TEMPLATE = "data.html.j2"


def data_report(
    dataset: "Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    use: str | None = None,
    limits: Sequence[int] = (),
    against: "Dataset | None" = None,
    examples: int = 2,
    sample: int | None = None,
    num_proc: int | None = None,
) -> dict[str, Any]:
    """Plain values by name, as `lines` and the page show them.

    use: "pairs", "completions", "prompts" or "unpaired" (labelled answers); by default what the columns are for.
    limits: of `max_length`, or of `max_prompt_length` for prompts. against: another split, which should share no row
    and no prompt with this one. sample: of more rows so many are checked and tokenised, drawn at random and the same
    each time; repeats and leakage are always those of all rows. num_proc: processes that tokenise. Raises DataError
    where no row can be used.
    """
    use = use or _use_of(dataset)
    report = BadRows()
    looked_at = _sample(dataset, sample)
    source = source_of(dataset)
    tokenised = _tokenised(looked_at, tokenizer, use, source=source, report=report, num_proc=num_proc)
    tokens, needed = _lengths(tokenised, use)
    fmt = _format(dataset, use)
    digests = digests_of(dataset, use, fmt)
    counts, edges = np.histogram(tokens, bins=min(BINS, int(tokens.max())), range=(0, int(tokens.max()) + 1))
    found: dict[str, Any] = {
        "source": source,
        "use": use,
        "format": f"{fmt.kind}, {'messages' if fmt.conversational else 'text'}"
        + (", the prompt taken from the pair" if fmt.implicit_prompt else "")
        + (_labels(tokenised["label"][:]) if use == "unpaired" else ""),
        "columns": list(dataset.column_names),
        "rows": len(dataset),
        "sample": len(looked_at),
        "usable": len(tokens),
        "dropped": {text: (len(at), at[:5]) for text, at in report.reasons.items()},
        "noted": {text: (len(at), at[:5]) for text, at in report.notes.items()},
        "tokens": int(tokens.sum()),
        "quantiles": {share: int(np.quantile(tokens, share)) for share in QUANTILES},
        "histogram": [(int(low), int(high), int(n)) for low, high, n in zip(edges, edges[1:], counts, strict=False)],
        "limits": {limit: _at(limit, tokens, needed) for limit in limits},
        "repeats": repeats(digests),
        "template": unused_template(dataset, tokenizer),
        "examples": [describe_example(tokenised[i], tokenizer, use) for i in range(min(examples, len(tokens)))],
    }
    if against is not None:
        found["leakage"] = leakage(digests, digests_of(against, use, _format(against, use)))
    return found


def _use_of(dataset: "Dataset") -> str:
    kinds = {"preference": "pairs", "prompt_only": "prompts"}
    kind = detect_format(dataset, source_of(dataset)).kind
    if kind == "prompt_completion" and "label" in dataset.column_names:
        return "unpaired"
    return kinds.get(kind, "completions")


def _labels(labels: Sequence[bool]) -> str:
    return f"; {sum(labels)} desirable, {len(labels) - sum(labels)} undesirable"


def _format(dataset: "Dataset", use: str) -> DataFormat:
    source = source_of(dataset)
    return detect_format(dataset, source) if use == "unpaired" else format_for(dataset, use, source)


def _sample(dataset: "Dataset", count: int | None) -> "Dataset":
    """So many rows at most, in their order, with their numbers in the column `row`."""
    import pyarrow as pa
    from datasets import Dataset

    if count is None or len(dataset) <= count:
        return dataset
    rows = np.sort(np.random.default_rng(SEED).choice(len(dataset), count, replace=False))
    table = dataset.with_format("arrow").select(rows)[:].replace_schema_metadata(None)
    if not has_numbers(dataset):
        kept = [name for name in table.column_names if name != "row"]
        table = table.select(kept).append_column("row", pa.array(rows))
    return Dataset(table.combine_chunks())


def _tokenised(dataset: "Dataset", tokenizer, use: str, **options) -> "Dataset":
    options["max_bad_share"] = 1.0
    if use == "pairs":
        scored = "tools" in dataset.column_names  # in whose answers tools may speak
        return tokenize_pairs(dataset, tokenizer, max_length=None, scored=scored, **options)
    if use == "completions":
        return tokenize_completions(dataset, tokenizer, max_length=None, **options)
    if use == "prompts":
        return tokenize_prompts(dataset, tokenizer, max_prompt_length=None, **options)
    if use == "unpaired":
        return tokenize_unpaired(dataset, tokenizer, max_length=None, **options)
    raise DataError(f"data are used as {', '.join(USES)}, not as {use!r}")


def _lengths(tokenised: "Dataset", use: str) -> tuple[np.ndarray, np.ndarray]:
    """Of each tokenised row, [rows]: the tokens of its longest sequence, and what is `needed`: the smallest limit that
    leaves something to train on is one more."""
    found = []
    columns = COLUMNS[use]
    for batch in tokenised.select_columns(list(columns)).with_format("arrow").iter(AT_ONCE):
        parts = [_lists(batch[name].combine_chunks()) for name in columns]
        found += [_row(use, row) for row in zip(*parts, strict=True)]
    tokens, needed = np.array(found).T
    return tokens, needed


def _lists(column) -> list[np.ndarray]:
    """The rows of a column of lists, as views."""
    return np.split(column.flatten().to_numpy(zero_copy_only=False), np.cumsum(column.value_lengths())[:-1])


def _row(use: str, parts: tuple[np.ndarray, ...]) -> tuple[int, int]:
    first = len(parts[0])
    if use == "completions":
        return first, max(int(parts[0].argmax()), 1)
    if use == "prompts":
        return first, first - 1
    if use == "unpaired":
        return first + len(parts[1]), first
    chosen, rejected = parts[1:]
    both = min(len(chosen), len(rejected))
    differs = chosen[:both] != rejected[:both]
    return first + max(len(chosen), len(rejected)), first + (int(differs.argmax()) if differs.any() else both)


def _at(limit: int, tokens: np.ndarray, needed: np.ndarray) -> dict[str, int]:
    """Rows that a limit drops (nothing that tells the answers apart, or nothing to train on, is left) and cuts."""
    dropped = needed >= limit
    return {"dropped": int(dropped.sum()), "cut": int(((tokens > limit) & ~dropped).sum())}


# ---- shown ----------------------------------------------------------------------------------------------------------


def lines(found: dict[str, Any]) -> list[str]:
    """The report for a terminal."""
    say = [
        f"{found['source']}: {head(found)}",
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


def head(found: dict[str, Any]) -> str:
    """How many rows there are, and what was looked at."""
    usable = f"{found['usable']} usable as {found['use']} ({found['format']})"
    if found["sample"] == found["rows"]:
        return f"{found['rows']} rows, {usable}"
    return (
        f"{found['rows']} rows, of which a sample of {found['sample']} was checked and tokenised: {usable}. What was "
        "dropped and noted, lengths and limits are those of the sample, repeats those of all rows"
    )


def _name(share: float) -> str:
    return {0.0: "least", 0.5: "median", 1.0: "most"}.get(share, f"{share:.0%}")


def write_page(path: str | Path, found: dict[str, Any]) -> Path:
    """The same as one HTML file."""
    from align.evaluation.report import render_page

    quantiles = [(_name(share), value) for share, value in found["quantiles"].items()]
    most = max(count for *_, count in found["histogram"])
    return render_page(Path(path), TEMPLATE, f=found, head=head(found), quantiles=quantiles, most=most)
