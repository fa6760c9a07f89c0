"""A table of scored completions: one row per completion, columns for its prompt, its text, proxy scores and a gold
score.

Scores belong to their row. Nothing is ever looked up by text, so repeated prompts and answers cannot mix up their
scores.
"""

import json
import logging
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from align.data.json_lines import row_of
from align.errors import DataError
from align.evaluation.rounding import deviation

logger = logging.getLogger(__name__)

PROMPT_COLUMNS = ("prompt_id", "prompt")
ID_COLUMNS = ("completion_id",)
COMPLETION = "completion"
CONFLICT_SD = 0.1  # scores of one text may differ by this share of the column's SD: batching changes the last digits


@dataclass
class ScoreTable:
    """R rows, P prompts. rows: per prompt, the row numbers of its answers [N_p], in file order.

    scores: column name -> float [R]. prompts, completions: text per row, None where the table has no such column.
    """

    path: Path
    rows: list[np.ndarray]
    scores: dict[str, np.ndarray]
    prompts: list[str] | None
    completions: list[str] | None

    def by_prompt(self, column: str) -> list[np.ndarray]:
        return [self.scores[column][rows] for rows in self.rows]


def read_score_table(
    path: str | Path,
    *,
    proxies: Sequence[str],
    gold: str,
    prompt: str | None = None,
    completion: str = COMPLETION,
    id_column: str | None = None,
) -> ScoreTable:
    """Read a .parquet, .csv, .jsonl or .json (list of objects) table and check every row that is used.

    prompt: the column that says which rows share a prompt; default `prompt_id`, else `prompt`. completion: read if
    there; under another name than the default it must be. id_column: an identifier of the answer within its prompt,
    which may not repeat; default `completion_id` if there. Raises DataError naming the rows (numbered from 0, a header
    not counted) on missing or non-finite scores, repeated identifiers, one text with two different scores, or a table
    that holds every row more than once.
    """
    path = Path(path)
    frame = load_table(path)
    prompt = prompt or next((name for name in PROMPT_COLUMNS if name in frame), None)
    id_column = id_column or next((name for name in ID_COLUMNS if name in frame), None)
    wanted: dict[str | None, str] = {
        **{name: "proxy" for name in proxies},
        gold: "gold",
        prompt: "prompt",
        id_column: "id",
        **({completion: "completion"} if completion != COMPLETION else {}),
    }
    wanted.pop(None, None)
    if prompt is None:
        columns = ", ".join(frame)
        raise DataError(
            f"{path} has neither a prompt_id nor a prompt column (columns: {columns}): --prompt_column names another"
        )
    for name, role in wanted.items():
        if name not in frame:
            raise DataError(f"{path} has no column {name!r} for the {role} (columns: {', '.join(frame)})")
    if len(frame) == 0:
        raise DataError(f"{path} has no rows")
    if gold in proxies:
        raise DataError(f"{gold!r} is both a proxy and the gold score: a curve of it against itself shows nothing")

    scores = {name: _numbers(frame[name], path) for name in (*proxies, gold)}
    if deviation(scores[gold]) == 0:
        raise DataError(f"{path}: column {gold!r} is {scores[gold][0]} in every row: a gold score that never differs")
    keys = _text(frame[prompt], path)
    codes = _codes(keys)
    order = np.argsort(codes, kind="stable")
    rows = np.split(order, np.flatnonzero(np.diff(codes[order])) + 1)
    completions = _text(frame[completion], path) if completion in frame else None
    if id_column is not None:
        _refuse_repeated_ids(codes, _codes(_text(frame[id_column], path)), id_column, path)
    elif completions is not None:
        _check_repeated_answers(codes, _codes(completions), scores, path)
    texts = _text(frame["prompt"], path) if "prompt" in frame else keys
    logger.info("%s: %d answers to %d prompts", path, len(frame), len(rows))
    return ScoreTable(path, rows, scores, texts, completions)


def text_column(columns: Collection[str], prompt: str | None) -> str:
    """The column with the prompts' texts: `prompt` where there is one, as the column that says which rows share a
    prompt may hold their numbers."""
    return "prompt" if prompt is None or "prompt" in columns else prompt


def check_texts(column, path: Path, why: str) -> None:
    """DataError unless each row of this column has a text, or messages."""
    _refuse_missing(column, path)
    if len(column) and column.dtype.kind != "O":
        raise DataError(
            f"{path}: column {column.name!r} holds numbers ({column.dtype}), and {why} as a text or as messages"
        )


def load_table(path: Path, *, texts: Sequence[str] = ()):
    """The table as a pandas frame, types as pyarrow infers them (so that the text "NA" stays text).

    texts: columns that stay text in a .csv whose every row has a number there, such as answers to sums."""
    import pyarrow as pa

    if not path.is_file():
        raise DataError(f"{path} does not exist")
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            table = pyarrow.parquet.read_table(path)
        elif path.suffix == ".csv":
            from pyarrow import csv

            table = csv.read_csv(
                path,
                parse_options=csv.ParseOptions(newlines_in_values=True),
                convert_options=csv.ConvertOptions(column_types=dict.fromkeys(texts, pa.string())),
            )
            odd = [field.name for field in table.schema if pa.types.is_binary(field.type)]
            if odd:
                raise DataError(f"{path}: {', '.join(map(repr, odd))} is not text in UTF-8: convert the file")
        elif path.suffix == ".jsonl":
            table = _table_of(list(_json_lines(path)), path)
        elif path.suffix == ".json":
            table = _table_of(json.loads(path.read_text(encoding="utf-8")), path)
        else:
            raise DataError(f"{path}: unknown kind of table {path.suffix!r}; give .parquet, .csv, .jsonl or .json")
    except (pa.ArrowException, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as {path.suffix}: {error}") from error
    twice = sorted(name for name, times in Counter(table.column_names).items() if times > 1)
    if twice:
        raise DataError(f"{path} has several columns named {', '.join(map(repr, twice))}: rename or remove all but one")
    # A frame that pandas has written carries row labels of its own; here a row is known by its place in the file.
    return table.to_pandas(ignore_metadata=True)


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield row_of(line, f"{path}, line {number}")


def _table_of(rows: Any, path: Path):
    """The table of a list of objects. A column is there if any row has it: pyarrow alone goes by the first row."""
    import pyarrow as pa

    if not isinstance(rows, list):
        raise DataError(f"{path} is a JSON {type(rows).__name__}, not a list of objects, one per completion")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{path}: row {number} is {row!r:.80}, not an object with the columns' names as keys")
    columns = {}
    for name in dict.fromkeys(chain.from_iterable(rows)):
        try:
            columns[name] = pa.array([row.get(name) for row in rows])
        except (pa.ArrowException, OverflowError) as error:
            raise DataError(f"{path}: column {name!r} does not hold values of one kind: {error}") from error
    return pa.table(columns)


def _numbers(column, path: Path) -> np.ndarray:
    import pandas as pd

    if column.dtype.kind in "mM":
        raise DataError(f"{path}: column {column.name!r} holds times, not scores")
    values = pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64)
    missing = np.flatnonzero(column.isna().to_numpy())
    if missing.size:
        raise DataError(f"{path}: column {column.name!r} is missing (empty or NaN) in {_rows(missing)}")
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        raise DataError(
            f"{path}: column {column.name!r} is not a finite number in {_rows(bad)}; the first is {column.iloc[bad[0]]}"
        )
    return values


def _refuse_missing(column, path: Path) -> None:
    missing = np.flatnonzero(column.isna().to_numpy())
    if missing.size:
        raise DataError(f"{path}: column {column.name!r} is missing in {_rows(missing)}")


def _text(column, path: Path) -> list[str]:
    _refuse_missing(column, path)
    if column.dtype.kind in "iu":  # numbers of prompts or answers, and many of them
        return list(map(str, column.tolist()))
    if column.map(lambda value: isinstance(value, str)).all():
        return column.tolist()
    # Conversational columns: lists of messages, one text form per conversation.
    return [v if isinstance(v, str) else json.dumps(_plain(v), ensure_ascii=False, default=str) for v in column]


def _plain(value):
    if isinstance(value, np.ndarray):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value.item() if isinstance(value, np.generic) else value


def _codes(values: list[str]) -> np.ndarray:
    import pandas as pd

    return pd.factorize(np.array(values, dtype=object))[0]


def _refuse_repeated_ids(prompts: np.ndarray, ids: np.ndarray, id_column: str, path: Path) -> None:
    import pandas as pd

    repeated = np.flatnonzero(pd.DataFrame({"prompt": prompts, "id": ids}).duplicated().to_numpy())
    if repeated.size:
        raise DataError(f"{path}: {id_column!r} of the same prompt repeats an earlier row in {_rows(repeated)}")


def _check_repeated_answers(prompts: np.ndarray, texts: np.ndarray, scores: dict[str, np.ndarray], path: Path) -> None:
    """A model may well draw an answer twice; then its scores agree, and the copies stay (they are its probability)."""
    import pandas as pd

    frame = pd.DataFrame({"prompt": prompts, "text": texts, **{f"score {name}": s for name, s in scores.items()}})
    groups = frame.groupby(["prompt", "text"], sort=False)
    sizes = groups["prompt"].transform("size").to_numpy()
    if sizes.min() > 1 and len(frame) > 2 * sizes.max():
        raise DataError(
            f"{path}: every answer is there at least twice (first again in "
            f"{_rows(np.flatnonzero(frame[['prompt', 'text']].duplicated()))}): was the file joined to itself? If "
            "these are draws of a model, give each an identifier and name its column (completion_id)"
        )
    for name, values in scores.items():
        group = groups[f"score {name}"]
        spread = (group.transform("max") - group.transform("min")).to_numpy()
        conflicts = np.flatnonzero(spread > CONFLICT_SD * values.std())
        if conflicts.size:
            same = conflicts[(prompts[conflicts] == prompts[conflicts[0]]) & (texts[conflicts] == texts[conflicts[0]])]
            raise DataError(
                f"{path}: the same answer to the same prompt has different scores {name!r} in {_rows(same)} "
                f"({', '.join(f'{values[row]:.6g}' for row in same[:5])}): scores and answers do not belong together, "
                "or the rows are different answers: then name their identifier (completion_id)"
            )
    repeats = int((sizes > 1).sum() - (sizes > 1).any() * len(groups.size()[groups.size() > 1]))
    if repeats:
        logger.info("%s: %d of %d answers repeat another one of their prompt (kept)", path, repeats, len(frame))


def _rows(numbers: np.ndarray) -> str:
    shown = ", ".join(str(number) for number in numbers[:10])
    return f"rows {shown}{f' and {numbers.size - 10} more' if numbers.size > 10 else ''}"
