"""Rows of published sets as rows that trainers read, before their texts become messages: columns that are one text,
answers in columns of their own with a verdict, answers in text beside messages."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from align.data.messages import with_role
from align.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset

SIGNS: dict[str, Callable[[float], bool]] = {"<0": lambda value: value < 0, ">0": lambda value: value > 0}
CHOICE = ("chosen", "rejected")
ANSWERS = ("completion", *CHOICE)
TALKS = ("messages", "conversations")
LOOKED_AT = 100


def joined(rows: "Dataset", names: Iterable[str]) -> "Dataset":
    """With a column `a+b` in the place of a and b for each such name: their texts, with an empty line between those
    that are not empty. `a.b` is the entry b of a column a of mappings."""
    for name in names:
        parts = name.split("+")
        tops = {part: part if part in rows.column_names else part.partition(".")[0] for part in parts}
        if name in rows.column_names or not {*tops.values()} <= {*rows.column_names}:
            continue
        values = [_entries(rows[top][:], part, part[len(top) + 1 :]) for part, top in tops.items()]
        if len(parts) > 1:
            each = zip(*values, strict=True)
            joint = ["\n\n".join(text for text in row if isinstance(text, str) and text.strip()) for row in each]
            rows = rows.remove_columns([part for part, top in tops.items() if part == top])
        else:
            (joint,) = values
        rows = rows.add_column(name, joint)
    return rows


def _entries(values: list, name: str, entry: str) -> list:
    for key in entry.split(".") if entry else ():
        if not all(isinstance(value, dict) and key in value for value in values):
            raise ConfigError(f"--rename {name}: not every row has {key!r} there")
        values = [value[key] for value in values]
    return values


def chosen(rows: "Dataset", answers: list[str], verdict: list[str]) -> "Dataset":
    """The rows with `chosen` and `rejected` in the place of two columns of answers, without those in which none is the
    better one. verdict: a column, and its values where the first and the second answer is better (`<0` and `>0` are
    such values too); or two columns of scores."""
    from datasets import Features

    _check(rows, answers, verdict)
    if len(verdict) == 3:
        better = [(_is(value, verdict[1]), _is(value, verdict[2])) for value in rows[verdict[0]][:]]
    else:
        better = [(_above(a, b), _above(b, a)) for a, b in zip(*(rows[name][:] for name in verdict), strict=True)]
    kept = [number for number, (first, second) in enumerate(better) if first != second]
    order = [answers if better[number][0] else answers[::-1] for number in kept]
    kinds = {name: kind for name, kind in rows.features.items() if name not in answers}
    kinds |= dict.fromkeys(CHOICE, rows.features[answers[0]])

    def made(row: dict[str, Any], place: int) -> dict[str, Any]:
        return dict(zip(CHOICE, (row[name] for name in order[place]), strict=True))

    gone = [name for name in answers if name not in CHOICE]
    return rows.select(kept).map(made, with_indices=True, remove_columns=gone, features=Features(kinds))


def _above(a: Any, b: Any) -> bool:
    return isinstance(a, int | float) and isinstance(b, int | float) and a > b  # NaN is above nothing


def _is(value: Any, wanted: str) -> bool:
    if wanted in SIGNS:
        return isinstance(value, int | float) and SIGNS[wanted](value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).lower() == wanted.lower()


def _check(rows: "Dataset", answers: list[str], verdict: list[str]) -> None:
    """ConfigError for columns that are not there, or hold what is no answer; for a column of verdicts that never has
    one of the two values: with a slip in one, the other answer would never be chosen."""
    named = [*answers, *(verdict[:1] if len(verdict) == 3 else verdict)]
    for name in named:
        if name not in rows.column_names:
            raise ConfigError(f"there is no column {name!r}; the columns are {', '.join(rows.column_names)}")
    for name in CHOICE:
        if name in rows.column_names and name not in answers:
            raise ConfigError(f"--answers makes a column {name!r}, and there is one already")
    if len(verdict) == 3:
        found = rows.unique(verdict[0])
        others = [one for one in found if not any(_is(one, value) for value in verdict[1:])]
        for value in verdict[1:] if others else ():
            if not any(_is(one, value) for one in found):
                shown = ", ".join(str(one) for one in found[:10])
                raise ConfigError(f"--better: no row has {value!r} in {verdict[0]!r}, which holds {shown}")


def has_messages(rows: "Dataset") -> bool:
    """Whether the texts that the rows are read for are messages: a prompt in text may stand beside a whole conversation
    that is another column."""
    from datasets import LargeList, List

    columns = {*rows.column_names}
    reads = {*CHOICE} if {*CHOICE} <= columns else {"completion"} & columns
    reads |= {"prompt"} & columns or (set() if reads else {*TALKS} & columns)
    return any(isinstance(rows.features[name], List | LargeList) for name in reads)


def has_texts(rows: "Dataset") -> bool:
    """Whether an answer is text, or one message that is in no list."""
    from datasets import Value

    return any(isinstance(rows.features[name], Value | dict) for name in {*ANSWERS} & {*rows.column_names})


def answers_alone(rows: "Dataset") -> bool:
    """Whether the answers, beside a prompt in text, are the assistant's messages alone: else the prompt is a copy of
    what the conversations begin with."""
    name = next((name for name in ANSWERS if name in rows.column_names), None)
    if name is None or "prompt" not in rows.column_names or not isinstance(rows[:1]["prompt"][0], str):
        return False
    return all(_role(answer[0]) == "assistant" for answer in rows[:LOOKED_AT][name] if answer and answer[0])


def in_messages(row: dict[str, Any], first: list[dict[str, str]], alone: bool) -> dict[str, Any]:
    """A row that has messages, with those of `first` before each conversation that begins without a system message. An
    answer in text is the assistant's message, one message in no list a list, and where the answers stand alone a prompt
    in text is the user's message."""
    row = {**row}
    for name in {*ANSWERS} & row.keys():
        if isinstance(row[name], str):
            row[name] = [{"role": "assistant", "content": row[name]}]
        elif isinstance(row[name], dict):  # LLaMA-Factory's
            row[name] = [with_role(row[name])]
    if alone and isinstance(row["prompt"], str):
        row["prompt"] = [{"role": "user", "content": row["prompt"]}]
    starts = ("prompt",) if isinstance(row.get("prompt"), list) else CHOICE
    return with_system(row, first, (*starts, *TALKS))


def with_system(row: dict[str, Any], first: list[dict[str, str]], names: Iterable[str]) -> dict[str, Any]:
    """The row with these messages before each conversation of these columns that begins without a system message."""
    for name in names if first else ():
        if isinstance(row.get(name), list) and (not row[name] or _role(row[name][0]) != "system"):
            row = {**row, name: [*first, *map(with_role, row[name])]}
    return row


def _role(message: Any) -> Any:
    return with_role(message).get("role") if isinstance(message, dict) else None
