"""Which of TRL's dataset formats a dataset has, and its columns in one shape.

A text is a string (standard) or a list of messages with `role` and `content` (conversational). The formats:
prompt-only (`prompt`), prompt-completion (`prompt`, `completion`), language modelling (`text` or `messages`) and
preference (`chosen`, `rejected`, and `prompt` or not: then it is the shared beginning of the two; or `prompt`,
`completions` and `scores`, whose best and worst answer are the pair).
"""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from align.data.streams import sample_of
from align.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

SCORED = ("completions", "scores")
"""Columns of several answers to one prompt, and of a number for each."""
TEXT_COLUMNS = ("prompt", "completion", "text", "messages", "chosen", "rejected")

TREE = ("message_id", "parent_id", "role")
"""Columns of sets that hold a message per row (OpenAssistant's)."""

# What other collections call these columns: only for the hint in an error, never renamed silently.
OTHER_NAMES = {
    "prompt": ("instruction", "question", "query", "input", "context", "problem", "history", "context_messages"),
    "completion": ("response", "answer", "output", "reply", "target"),
    "messages": ("conversations", "conversation", "dialog", "dialogue"),
    "chosen": ("preferred", "accepted", "winner", "positive"),
    "rejected": ("dispreferred", "loser", "negative"),
    "text": ("content", "body"),
}

EXPECTED = {
    "prompts": "'prompt', or a preference set ('chosen' and 'rejected') whose pairs share their beginning",
    "completions": "'prompt' and 'completion', or 'messages', or 'text', or 'chosen' and 'rejected' (trains chosen)",
    "pairs": "'chosen' and 'rejected', and 'prompt' unless the two texts share it as their beginning (or 'prompt', "
    "'completions' and 'scores')",
    "unpaired": "'prompt', 'completion' and 'label', or 'chosen' and 'rejected' (two rows each)",
    "any": "'prompt' | 'prompt', 'completion' | 'text' | 'messages' | 'chosen', 'rejected' (with or without 'prompt')",
}


PAIR = ("chosen", "rejected")
NEEDED = {
    "prompts": ("prompt",),
    "pairs": ("prompt", *PAIR),
    "completions": ("prompt", "completion", "text", "messages"),
    "unpaired": ("prompt", "completion"),
}
"""Names that a hint proposes for each use."""
TWO = ("response", "answer", "completion", "conversation", "human_ref", "output", "summary", "generation")
ENDS = (("_0", "_1"), ("_1", "_2"), ("1", "2"), ("_a", "_b"), ("_A", "_B"))


@dataclass(frozen=True)
class DataFormat:
    """kind: "prompt_only", "prompt_completion", "language_modeling" or "preference".

    conversational: the texts are lists of messages. implicit_prompt: a preference set whose prompt is the beginning
    that chosen and rejected share. scored: a preference set of several answers with scores, instead of choices.
    """

    kind: str
    conversational: bool
    implicit_prompt: bool = False
    scored: bool = False


def detect_format(dataset: "Dataset", source: str = "") -> DataFormat:
    """The richest format that the columns allow: preference, then prompt-completion, language modelling, prompt-only.

    Raises DataError when no format fits (naming the columns found, those expected and the nearest), or when a column
    holds something else than text or messages.
    """
    return _format(dataset, ("preference", "prompt_completion", "language_modeling", "prompt_only"), "any", source)


def format_for(dataset: "Dataset", use: str, source: str = "") -> DataFormat:
    """How the dataset serves one use: "prompts" (rollouts), "completions" (SFT), "pairs" (preferences) or
    "unpaired" (labelled answers).

    A preference set serves as prompts too, and its chosen answers as completions.
    """
    kinds = {
        "prompts": ("prompt_only", "preference"),
        "completions": ("prompt_completion", "language_modeling", "preference"),
        "pairs": ("preference",),
        "unpaired": ("prompt_completion",),
    }[use]
    columns = columns_of(dataset, source)
    if use == "prompts" and {"chosen", "rejected"} <= columns:
        kinds = ("preference",)  # which knows whether the column `prompt` or the pair holds the whole prompt
    return _format(dataset, kinds, use, source)


def _format(dataset: "Dataset", kinds: Sequence[str], use: str, source: str) -> DataFormat:
    columns = columns_of(dataset, source)
    needed = {
        "preference": {"chosen", "rejected"},
        "prompt_completion": {"prompt", "completion"},
        "language_modeling": next(({n} for n in ("messages", "conversations") if n in columns), {"text"}),
        "prompt_only": {"prompt"},
    }
    scored = "preference" in kinds and not needed["preference"] <= columns and {*SCORED} <= columns
    if scored and "prompt" in columns and not {"completion", "messages", "text"} & columns:
        return DataFormat("preference", _holds_messages(dataset, source), scored=True)
    for kind in kinds:
        if needed[kind] <= columns:
            break
    else:
        raise DataError(_missing_columns(columns, use, source))
    if kind == "language_modeling" and {"text", *TREE} <= columns:
        raise DataError(
            f"{source or 'dataset'}: each row is one message of a conversation (columns {', '.join(TREE)}), and would "
            "be trained as a text by itself: put the messages of each conversation into a column 'messages', by "
            "'parent_id' (docs/data.md, published sets)"
        )
    shapes = {name: _is_conversational(dataset, name, source) for name in sorted(needed[kind])}
    implicit = False
    if kind == "preference":
        # A prompt in plain text beside whole conversations is a copy of their first message.
        implicit = "prompt" not in columns or (shapes["chosen"] and not _is_conversational(dataset, "prompt", source))
        if "prompt" not in columns and not shapes["chosen"]:
            _refuse_other_prompt(dataset, columns, source)
        if not implicit:
            shapes["prompt"] = _is_conversational(dataset, "prompt", source)
    if len(set(shapes.values())) > 1:
        held = ", ".join(f"'{name}' holds {'messages' if talk else 'text'}" for name, talk in shapes.items())
        raise DataError(f"{source or 'dataset'}: {held}. All must be plain text, or all lists of messages.")
    return DataFormat(kind, any(shapes.values()), implicit)


def _refuse_other_prompt(dataset: "Dataset", columns: set[str], source: str) -> None:
    """DataError for two answers as text beside the question under another name: what they begin with in common would
    be taken for the prompt."""
    rows = dataset.select_columns(["chosen", *sorted({*OTHER_NAMES["prompt"]} & columns)])[:1]
    for name, values in rows.items():
        text = values[0].strip() if name != "chosen" and values and isinstance(values[0], str) else ""
        if text and text not in str(rows["chosen"][0]):
            raise DataError(
                f"{source or 'dataset'} has the answers 'chosen' and 'rejected' without 'prompt', and a column "
                f"{name!r} that is not in them: rename it, with `align data convert {source or 'DATA'} --plain "
                f"--rename {name}=prompt --to FILE.jsonl` if the model has a chat template"
            )


def columns_of(dataset: "Dataset", source: str = "", streams: bool = False) -> set[str]:
    """The columns of one split: the one door of all trainers. DataError for anything but a `datasets.Dataset`, with
    what makes one of it, and for one with a transform, which would not be applied: rows are tokenised as they are
    stored. streams: a `datasets.IterableDataset` may pass, where the use can do with one."""
    from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

    name = source or "dataset"
    if isinstance(dataset, Dataset):
        if dataset.format["type"] == "custom":
            raise DataError(
                f"{name} has a transform (set_transform, with_transform), which would not be applied: make its rows "
                "with dataset.map, or take it off with dataset.reset_format()"
            )
        return set(dataset.column_names)
    if isinstance(dataset, DatasetDict | IterableDatasetDict):
        raise DataError(
            f"{name} has several splits, choose one of: {', '.join(dataset)}. From Python: "
            f'train_dataset=data["{next(iter(dataset), "train")}"].'
        )
    if isinstance(dataset, IterableDataset):
        if streams:
            return set(sample_of(dataset, source).column_names)
        raise DataError(
            f"{name} is a streamed dataset, which serves SFT, preference pairs, single reward models and "
            "on-policy prompts alone: load it without streaming=True. Rows are read from disk and tokenised once "
            "(docs/data.md)."
        )
    remedies = {
        "NoneType": "there are no rows",
        "list": "make one of a list of rows with datasets.Dataset.from_list(rows)",
        "tuple": "make one with datasets.Dataset.from_list(list(rows))",
        "dict": "several sets by name are for eval_dataset; of columns, datasets.Dataset.from_dict(columns) makes one",
        "DataFrame": "make one with datasets.Dataset.from_pandas(frame)",
        "str": "load rows with align.data.load_rows(name)",
    }
    kind = type(dataset).__name__
    rows = "make one of what yields rows (mappings of text) with datasets.Dataset.from_list([dataset[i] for i in ...])"
    raise DataError(f"{name}: expected a datasets.Dataset, got {kind}: {remedies.get(kind, rows)}.")


def check_tokens(dataset: "Dataset", names: Iterable[str], source: str = "") -> None:
    """DataError where one of these columns, which rows that are tokenised have their tokens (or a 0 or 1 for each) in,
    holds something else: a column of the user's, in which no trainer would find tokens. Of a stream the first rows are
    looked at."""
    features = sample_of(dataset, source).features
    for name in names:
        if not holds_tokens(features[name]):
            raise DataError(
                f"{source or 'dataset'}: rows that are tokenised have the column {name!r}, with a list of whole "
                f"numbers in each row, and here it holds {features[name]}: rename or remove it"
            )


def holds_tokens(feature: Any) -> bool:
    """Whether a column is of lists of whole numbers, or of a 0 or 1 each."""
    held = str(getattr(getattr(feature, "feature", None), "dtype", ""))
    return held.startswith(("int", "uint", "bool", "null"))  # null: of empty lists


def _is_conversational(dataset: "Dataset", column: str, source: str) -> bool:
    """Whether the first value that is not missing is a list. (A column without values is reported row by row later.)"""
    value, row = next(((value, row) for row, value in enumerate(dataset[column]) if value is not None), ("", 0))
    if isinstance(value, str | list):
        return isinstance(value, list)
    raise DataError(
        f"{source or 'dataset'}, row {row}: column '{column}' holds {type(value).__name__} ({value!r:.60}), expected "
        "text or a list of messages. Convert the column, for example with dataset.cast_column or map."
    )


def _holds_messages(dataset: "Dataset", source: str) -> bool:
    """Whether the prompts and `completions` of scored answers are messages; DataError where only one of them is."""
    answers = next((answers for answers in dataset["completions"] if answers), [""])
    kinds = {"prompt": _is_conversational(dataset, "prompt", source), "completions": isinstance(answers[0], list)}
    if len(set(kinds.values())) > 1:
        held = ", ".join(f"'{name}' holds {'messages' if talk else 'text'}" for name, talk in kinds.items())
        raise DataError(f"{source or 'dataset'}: {held}. All must be plain text, or all lists of messages.")
    return kinds["prompt"]


def _two_answers(columns: set[str]) -> str | None:
    """Two columns whose names differ in their end alone, as those of two answers do."""
    for ends in ENDS:
        for name in sorted(columns):
            stem = name.removesuffix(ends[0])
            if stem != name and stem.startswith(TWO) and stem + ends[1] in columns:
                return f"{name} {stem}{ends[1]}"
    return None


def _missing_columns(columns: set[str], use: str, source: str) -> str:
    purpose = {"any": "no known format", "prompts": "no prompts", "completions": "no completions to train on"}
    purpose["unpaired"] = "no labelled answers"
    message = (
        f"{source or 'dataset'} has {purpose.get(use, 'no preference pairs')}: expected the columns {EXPECTED[use]}; "
        f"found {', '.join(repr(name) for name in sorted(columns)) or 'none'}."
    )
    two = _two_answers(columns) if use == "pairs" else None
    near = []
    for name in sorted(columns - {*TEXT_COLUMNS, *SCORED} | ({"messages"} & columns if use == "prompts" else set())):
        match = difflib.get_close_matches(name.lower(), NEEDED.get(use, TEXT_COLUMNS), n=1, cutoff=0.75)
        match += [ours for ours, theirs in OTHER_NAMES.items() if name.lower() in theirs]
        match += ["prompt"] if name == "messages" else []
        match = [ours for ours in match if ours in NEEDED.get(use, TEXT_COLUMNS) and not (two and ours in PAIR)]
        near += [f"{name!r} -> '{match[0]}'"] if match else []
    if near:
        message += f" Rename what is meant: {', '.join(near)}."
    if two:
        message += (
            f" Two answers with a verdict are made a pair by `align data convert {source or 'DATA'} --answers {two} "
            "--better COLUMN FIRST SECOND`, with the column that says which is better and its values for either "
            "(docs/data.md)."
        )
    if len(set(SCORED) & columns) == 1:
        message += f" '{SCORED[0]}', several answers to each prompt, need '{SCORED[1]}', a number for each of them."
    return message
