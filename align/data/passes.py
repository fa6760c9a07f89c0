"""One pass over rows: each is checked and tokenised, or counted as bad. Large sets are made once and kept on disk."""

import json
import os
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from align.data.bad_rows import BadRow, BadRows
from align.data.beside import look_beside
from align.data.cache import TMP_ELSEWHERE, cached, room_in
from align.data.fingerprint import code_digest, rows_digest, text_digest, tokenizer_digest
from align.data.formats import columns_of
from align.data.rows import source_of
from align.data.streams import is_stream, sample_of, tokenized_stream

if TYPE_CHECKING:
    from datasets import Dataset, Features, IterableDataset
    from transformers import PreTrainedTokenizerBase

Columns = dict[str, Any]
Note = Callable[[str], None]
Found = list[tuple[int, str, str]]
"""(row, "reasons" or "notes", text) of what was found in some rows."""

IN_MEMORY = 1000
"""So many rows are tokenised in memory at each start; more are kept on disk (`align.data.cache`)."""


@dataclass
class Recipe:
    """How rows of one kind become token ids.

    prepare(row, note) -> (texts, columns to replace); encode_rows(texts of a batch); finish(encoded, note) -> new
    columns. prepare and finish raise BadRow. columns: the feature of each new or replaced column ("int32": a list of
    these).
    """

    prepare: Callable[[Columns, Note], tuple[Any, Columns]]
    encode_rows: Callable[[list[Any]], list]
    finish: Callable[[Any, Note], Columns]
    columns: dict[str, Any]

    def features(self, given: "Features") -> "Features":
        """Of the tokenised rows, from those of the dataset."""
        from datasets import Features, List, Value

        new = {name: List(Value(kind)) if isinstance(kind, str) else kind for name, kind in self.columns.items()}
        return Features({**given, **new, "row": Value("int64")})

    def batch(self, rows: list[Columns]) -> tuple[list[Columns], Found]:
        """The tokenised rows of those that are good, and what was found. rows: with their numbers, `row`."""
        ready, texts, kept, found = [], [], [], []
        for row in rows:
            notes: dict[str, None] = {}
            try:
                text, replaced = self.prepare(row, notes.setdefault)
            except BadRow as reason:
                found.append((row["row"], "reasons", str(reason)))
                continue
            ready.append(({**row, **replaced}, notes))
            texts.append(text)
        for (row, notes), encoded in zip(ready, self.encode_rows(texts), strict=True):
            try:
                kept.append({**row, **self.finish(encoded, notes.setdefault)})
            except BadRow as reason:
                found.append((row["row"], "reasons", str(reason)))
                continue
            found += [(row["row"], "notes", text) for text in notes]
        return kept, found


def started(
    report: BadRows | None, source: str, dataset: "Dataset | IterableDataset", streams: bool = False
) -> tuple[BadRows, "Dataset"]:
    """The report of a pass over a dataset that is one of rows, and the rows that tell its format: itself, or the first
    ones of a stream. DataError for anything else."""
    columns_of(dataset, source, streams)
    report = BadRows() if report is None else report
    report.source = source_of(dataset, source)
    rows = sample_of(dataset, report.source)
    look_beside(rows, report.source)
    report.total = 0 if is_stream(dataset) else len(rows)
    return report, rows


def tokenized(
    dataset: "Dataset | IterableDataset",
    tokenizer: "PreTrainedTokenizerBase",
    recipe: Recipe,
    limits: dict[str, Any],
    report: BadRows,
    *,
    max_bad_share: float,
    num_proc: int | None,
) -> Any:
    """The good rows by a recipe, in their order, whatever the number of processes; of a stream lazily. limits: all that
    the recipe depends on beside the tokenizer, for the key of the cache."""
    from datasets import IterableDataset, is_caching_enabled

    if isinstance(dataset, IterableDataset):
        return tokenized_stream(dataset, recipe, report.source, max_bad_share)
    if len(dataset) <= IN_MEMORY:
        found: Found = []
        rows = _map(dataset, recipe, found.extend, report.source, keep_in_memory=True)
        _add(report, found)
    elif is_caching_enabled():
        key = text_digest(
            {
                "rows": rows_digest(dataset),
                "features": str(dataset.features),
                "tokenizer": tokenizer_digest(tokenizer),
                "code": code_digest(),
                "limits": limits,
            }
        )
        rows = cached(key, partial(_make, dataset, recipe, num_proc), report)
    else:
        folder = temporary_folder()
        with room_in(folder.parent, "tokenised rows", TMP_ELSEWHERE):
            rows = _make(dataset, recipe, num_proc, folder, report)
    report.check(max_bad_share)
    return rows


def temporary_folder() -> Path:
    """A new one, beside what `datasets` writes for this process alone: removed when the process ends."""
    from datasets.fingerprint import get_temporary_cache_files_directory

    folder = Path(get_temporary_cache_files_directory()) / uuid.uuid4().hex
    folder.mkdir()
    return folder


def _make(dataset: "Dataset", recipe: Recipe, num_proc: int | None, folder: Path, report: BadRows) -> "Dataset":
    """Tokenise into Arrow files of a folder, with bounded memory."""
    with _no_threads(num_proc):
        rows = _map(
            dataset,
            recipe,
            partial(_append, folder),
            report.source,
            cache_file_name=str(folder / "rows.arrow"),
            num_proc=None if num_proc == 1 else num_proc,
        )
    found = (json.loads(line) for file in folder.glob("found-*.jsonl") for line in file.open(encoding="utf-8"))
    _add(report, found)
    for file in folder.glob("found-*.jsonl"):
        file.unlink()
    return rows


def _map(dataset: "Dataset", recipe: Recipe, tell: Callable[[Found], None], source: str, **options) -> "Dataset":
    """tell: gets what was found, on the process that found it."""
    features = recipe.features(dataset.features)
    own = has_numbers(dataset)

    def tokenize_batch(batch: Columns, indices: list[int]) -> Columns:
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        rows = [{**row, "row": row["row"] if own else i} for i, row in zip(indices, rows, strict=True)]
        kept, found = recipe.batch(rows)
        tell(found)
        return {name: [row[name] for row in kept] for name in features}

    return dataset.with_format(None).map(
        tokenize_batch,
        batched=True,
        with_indices=True,
        features=features,
        remove_columns=dataset.column_names,
        load_from_cache_file=False,  # that of `datasets` would not know of a change in this code
        new_fingerprint=uuid.uuid4().hex,
        desc=f"Tokenising {source}",
        **options,
    )


def has_numbers(dataset: "Dataset") -> bool:
    """Whether the rows say themselves which ones they are of a larger set."""
    from datasets import Value

    numbers = dataset.features.get("row")
    return isinstance(numbers, Value) and numbers.dtype.startswith("int") and not dataset.data["row"].null_count


def numbered(dataset: "Dataset") -> "Dataset":
    """Rows that are taken as they are, with their numbers: their own, or counted from 0 in the place of a column `row`
    that has others."""
    if has_numbers(dataset):
        return dataset
    others = [name for name in dataset.column_names if name != "row"]
    return dataset.select_columns(others).add_column("row", np.arange(len(dataset)))


def _append(folder: Path, found: Found) -> None:
    if found:
        with (folder / f"found-{os.getpid()}.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(one) + "\n" for one in found)


def _add(report: BadRows, found: Iterable[Sequence]) -> None:
    """Each text is kept once, however many rows it was found in."""
    for row, kind, text in found:
        (report.add if kind == "reasons" else report.note)(row, text)
    for kind in (report.reasons, report.notes):
        for rows in kind.values():
            rows.sort()  # several processes found them
        for text in sorted(kind, key=lambda text: kind[text][0]):
            kind[text] = kind.pop(text)


@contextmanager
def _no_threads(num_proc: int | None):
    """A tokenizer's own threads and several processes get in each other's way, and it warns of it at every fork."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    if num_proc is not None and num_proc > 1:
        os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before
