"""Digests of what token ids follow from: rows by their content, a tokenizer, and the code that brings them together."""

import hashlib
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.data.today import day, writes_date

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

CODE = (
    "bad_rows", "checks", "encode", "ending", "formats", "messages", "passes", "ranked", "today", "tokenize",
    "tokenized", "turns", "unpaired",
)  # fmt: skip
"""Modules of this folder that decide which ids a row becomes."""
PACKAGES = ("datasets", "tokenizers", "transformers", "jinja2")


def rows_digest(dataset: "Dataset", leave_out: tuple[str, ...] = ()) -> str:
    """Of all rows of a dataset, in order, as Arrow writes them: never of names and times of files."""
    import pyarrow as pa

    names = sorted(name for name in dataset.column_names if name not in leave_out)
    digest = hashlib.blake2b(digest_size=16)
    for table in dataset.select_columns(names).with_format("arrow").iter(1000):
        table = table.select(names).replace_schema_metadata(None)
        table = table.take(pa.array(range(len(table)))).combine_chunks()  # copied: slices of buffers differ
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        digest.update(sink.getvalue())
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def tokenizer_digest(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Of everything that ids depend on: vocabulary, rules, special tokens, chat template, class. A template that writes
    the date counts with it."""
    from datasets.fingerprint import Hasher

    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        for setting in ("truncation", "padding"):  # of the last call
            rules.pop(setting)
    else:
        rules = Hasher.hash(tokenizer)
    kind = type(tokenizer)
    source = getattr(sys.modules[kind.__module__], "__file__", None)  # a class of a notebook has none
    template = tokenizer.chat_template
    return text_digest(
        {
            "class": f"{kind.__module__}.{kind.__qualname__}",
            "code": Hasher.hash(kind) if source is None else file_digest(Path(source)),
            "rules": rules,
            "special": tokenizer.special_tokens_map,
            "split_special_tokens": tokenizer.split_special_tokens,
            "template": template,
            "date": str(day()) if writes_date(tokenizer) else None,
        }
    )


def code_digest() -> str:
    """Of the code that makes ids of rows, and of the packages that it calls."""
    folder = Path(__file__).parent
    return text_digest(
        {name: file_digest(folder / f"{name}.py") for name in CODE}
        | {name: importlib.metadata.version(name) for name in PACKAGES}
    )


def text_digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()
