"""Dialogues written as text, "Human: ... Assistant: ..." (hh-rlhf and its kin), and the messages that they mean.

A chat model answers through its chat template. Trained on such text as it stands it learns another format than the one
that it is asked in, and nothing fails: so the loaders warn (`warn_of_dialogues`), and `align data convert` converts.
"""

import logging
import re
import uuid
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from align.data.arrange import TALKS, answers_alone, has_messages, has_texts, in_messages, with_system
from align.data.bad_rows import BadRow, BadRows
from align.data.cache import TMP_ELSEWHERE, room_in
from align.data.formats import SCORED, DataFormat, format_for
from align.data.messages import HOLDERS, by_role
from align.data.passes import temporary_folder
from align.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset, Features

logger = logging.getLogger(__name__)

Messages = list[dict[str, str]]
ROLES = {"human": "user", "user": "user", "assistant": "assistant", "ai": "assistant", "bot": "assistant"}
MARKER = re.compile(r"(?:\A|\n)[ \t]*(Human|User|Assistant|AI|Bot):[ \t]*")
LOOKED_AT, SHARE = 100, 0.5
ANSWERS = ("chosen", "rejected")


def messages_of(text: str) -> Messages | None:
    """The turns of a dialogue, the last one perhaps empty; None for a text that is none: one that does not begin with a
    human's turn. Each speaker keeps its first name: in a dialogue of Human: and Assistant:, lines that begin with
    User: or Bot: are text of an answer (a script, say)."""
    found = list(MARKER.finditer(text))
    if not found or text[: found[0].start()].strip() or _role(found[0]) != "user":
        return None
    names = {_role(marker): marker[1] for marker in reversed(found)}
    turns = [marker for marker in found if marker[1] == names[_role(marker)]]
    ends = [marker.start() for marker in turns[1:]] + [len(text)]
    return [
        {"role": _role(marker), "content": text[marker.end() : end].strip()}
        for marker, end in zip(turns, ends, strict=True)
    ]


def _role(marker: re.Match) -> str:
    return ROLES[marker[1].lower()]


def dialogue_share(dataset: "Dataset") -> float:
    """The share of the first rows whose beginning is a dialogue with an assistant."""
    names = [name for name in ("prompt", "text", "chosen") if name in dataset.column_names]
    values = [value for value in dataset[:LOOKED_AT][names[0]] if isinstance(value, str)] if names else []
    talks = [messages_of(value) for value in values]
    found = [talk for talk in talks if talk and any(message["role"] == "assistant" for message in talk)]
    return len(found) / len(values) if values else 0.0


def warn_of_dialogues(dataset: "Dataset", tokenizer, source: str) -> None:
    """Once per tokenizer: a warning where a chat model is to be trained on dialogues as plain text."""
    if not tokenizer.chat_template or vars(tokenizer).get("_told_of_dialogues"):
        return
    if dialogue_share(dataset) >= SHARE:
        tokenizer._told_of_dialogues = True
        logger.warning(
            "%s holds dialogues as text (Human: ... Assistant: ...), and the model has a chat template, which is not "
            "used for plain text: what is trained is not how the model is asked. Convert the rows to messages with "
            "`align data convert %s --to FILE.jsonl`",
            source,
            source,
        )


def warn_of_text_prompts(dataset: "Dataset", tokenizer, source: str) -> None:
    """As `warn_of_dialogues`, and for prompts in text beside the conversations that they are copies of, which have the
    system messages and go through the chat template (ultrachat, no_robots)."""
    warn_of_dialogues(dataset, tokenizer, source)
    if tokenizer.chat_template and "messages" in dataset.column_names:
        logger.warning(
            "%s: the prompts are the column 'prompt', which is text and goes through no chat template, and not those "
            "of the column 'messages': rows.map(lambda row: {'prompt': row['messages'][:-1]}) makes prompts of these",
            source,
        )


def unused_template(dataset: "Dataset", tokenizer) -> str | None:
    """What a look at plain text says where the model has a chat template; None where all is as it should be."""
    texts = [name for name in ("prompt", "text", "chosen") if name in dataset.column_names]
    if not tokenizer.chat_template or not texts or not isinstance(dataset[0][texts[0]], str):
        return None
    return (
        "plain text: the model's chat template is not used, though it is what the model will be asked with; "
        "`align data convert` makes messages"
    )


def convert_dialogues(
    dataset: "Dataset",
    *,
    plain: bool = False,
    system: str | None = None,
    system_column: str | None = None,
    changed: bool = False,
    max_bad_share: float = 0.0,
    source: str = "",
) -> "tuple[Dataset, BadRows]":
    """The rows with messages in place of text, and the rows that were left out. Other columns stay.

    Takes prompts, prompts with completions (also several with scores), `text`, and preference pairs, whose prompt is a
    column or the beginning that both share. plain: the texts are no dialogues: a prompt is what a user says, whole, and
    an answer what the assistant says, each in a column of its own. system: a message put before every conversation;
    system_column: the column that holds one for each row, or nothing. `text` becomes `messages`. Messages stay as they
    are; an answer in text beside a prompt of messages becomes one. changed: columns have other names than they had, so
    that rows of messages are to be written too. Raises DataError if more than `max_bad_share` of the rows cannot be
    read so.
    """
    talks, alone = has_messages(dataset), answers_alone(dataset)
    fmt = DataFormat("", True) if talks else format_for(dataset, _use(dataset), source)
    if fmt.conversational and not (system or system_column or changed or alone or has_texts(dataset)):
        raise DataError(f"{source or 'the data'} holds messages already: nothing is to be converted")
    if plain and (fmt.implicit_prompt or fmt.kind == "language_modeling"):
        raise DataError(f"{source or 'the data'} has no column 'prompt', and only that says what is asked")
    report = BadRows(source=source or "dataset", total=len(dataset))
    folder = temporary_folder()
    options: dict[str, Any] = {
        "with_indices": True,
        "batched": True,
        "remove_columns": dataset.column_names,
        "features": _features(dataset.features, fmt, bool(system or system_column), system_column, alone),
        "cache_file_name": str(folder / "messages.arrow"),
        "new_fingerprint": uuid.uuid4().hex,
        "desc": f"Converting {report.source}",
    }

    def convert(batch: dict[str, list], numbers: list[int]) -> dict[str, list]:
        rows = []
        for number, *values in zip(numbers, *batch.values(), strict=True):
            row = dict(zip(batch, values, strict=True))
            try:
                first = _system(row.pop(system_column) if system_column else system)
                if talks:
                    rows.append(in_messages(row, first, alone))
                else:
                    row = with_system(row, first, TALKS)
                    rows.append(_said(row, first) if plain else _converted(row, fmt.kind, fmt.implicit_prompt, first))
            except BadRow as reason:
                report.add(number, str(reason))
        return {name: [row[name] for row in rows] for name in options["features"]}

    with room_in(folder, "converted rows", TMP_ELSEWHERE):
        rows = dataset.with_format(None).map(convert, **options)
    report.check(max_bad_share)
    return rows, report


def _features(given: "Features", fmt: DataFormat, system: bool, system_column: str | None, alone: bool) -> "Features":
    """Of the converted rows: the texts are messages, `text` is `messages`. system: a message was put before them."""
    from datasets import Features, List, Value

    given = Features({name: kind for name, kind in given.items() if name != system_column})
    messages = List({"role": Value("string"), "content": Value("string")})
    if system and not fmt.conversational:
        given = Features({name: by_role(kind) if name in TALKS else kind for name, kind in given.items()})
    if fmt.conversational:
        talks = {name: by_role(kind) if system else kind for name, kind in given.items() if name in HOLDERS}
        texts_too = (*ANSWERS, "completion", *(["prompt"] if alone else []))
        talks |= {name: messages for name in texts_too if isinstance(given.get(name), Value)}
        talks |= {name: by_role(List(given[name])) for name in texts_too if isinstance(given.get(name), dict)}
        return Features({name: talks.get(name, kind) for name, kind in given.items()})
    if fmt.kind == "language_modeling":
        return Features({"messages": messages, **{name: kind for name, kind in given.items() if name != "text"}})
    texts = {*ANSWERS, *(() if fmt.implicit_prompt else ("prompt", "completion"))}
    new: dict[str, Any] = dict.fromkeys(texts, messages) | ({"completions": List(messages)} if fmt.scored else {})
    return Features({name: new.get(name, kind) for name, kind in given.items()})


def _use(dataset: "Dataset") -> str:
    columns = set(dataset.column_names)
    if {*ANSWERS} <= columns or ({*SCORED} <= columns and "completion" not in columns):
        return "pairs"
    return "prompts" if "prompt" in columns and "completion" not in columns else "completions"


def _system(text: Any) -> Messages:
    if text is not None and not isinstance(text, str):
        raise BadRow("the system message is no text")
    return [{"role": "system", "content": text}] if text and text.strip() else []


def _said(row: dict[str, Any], first: Messages) -> dict[str, Any]:
    """Prompt and answers of a row as one message each."""
    answers = {name: _message(row[name], name, "assistant") for name in row.keys() & {"completion", *ANSWERS}}
    answers |= _several(row, partial(_message, role="assistant"))
    return {**row, **answers, "prompt": first + _message(row["prompt"], "prompt", "user")}


def _message(text: Any, name: str, role: str) -> Messages:
    if not isinstance(text, str) or not text.strip():
        raise BadRow(f"{name} is empty")
    return [{"role": role, "content": text}]


def _several(row: dict[str, Any], one: Callable[[Any, str], Messages]) -> dict[str, Any]:
    """The scored answers of a row that has them."""
    if not {*SCORED} <= row.keys():
        return {}
    if not isinstance(row["completions"], list):
        raise BadRow("completions is no list")
    return {"completions": [one(text, "one of completions") for text in row["completions"]]}


def _converted(row: dict[str, Any], kind: str, implicit: bool, first: Messages) -> dict[str, Any]:
    if kind == "language_modeling":
        talk = _talk(row["text"], "text")
        if talk[-1]["role"] != "assistant" or not talk[-1]["content"]:
            raise BadRow("text does not end with an answer")
        return {"messages": first + talk, **{name: value for name, value in row.items() if name != "text"}}
    if implicit:
        return {**row, **{name: first + _whole(row[name], name) for name in ANSWERS}}
    prompt = _talk(row["prompt"], "prompt")
    if prompt[-1] == {"role": "assistant", "content": ""}:
        prompt = prompt[:-1]
    if prompt[-1]["role"] != "user":
        raise BadRow("prompt does not end with the human's turn")
    answers: dict[str, Any] = {name: _answer(row[name], name) for name in ("completion", *ANSWERS) if name in row}
    return {**row, "prompt": first + prompt, **answers, **_several(row, _answer)}


def _talk(text: Any, name: str) -> Messages:
    talk = messages_of(text) if isinstance(text, str) else None
    if talk is None:
        raise BadRow(f"{name} does not begin with a turn of Human: or User: (`--plain` takes texts as they are)")
    if any(not message["content"] for message in talk[:-1]):
        raise BadRow(f"{name} has an empty turn")
    if any(a["role"] == b["role"] for a, b in zip(talk, talk[1:], strict=False)):
        raise BadRow(f"{name} has two turns of one speaker in a row")
    return talk


def _whole(text: Any, name: str) -> Messages:
    talk = _talk(text, name)
    if talk[-1]["role"] != "assistant" or not talk[-1]["content"]:
        raise BadRow(f"{name} does not end with an answer")
    return talk


def _answer(text: Any, name: str) -> Messages:
    """One answer, with or without "Assistant:" in front."""
    if not isinstance(text, str) or not text.strip():
        raise BadRow(f"{name} is empty")
    parts = MARKER.split(text)
    if len(parts) == 1:
        return [{"role": "assistant", "content": text.strip()}]
    if len(parts) == 3 and not parts[0].strip() and ROLES[parts[1].lower()] == "assistant" and parts[2].strip():
        return [{"role": "assistant", "content": parts[2].strip()}]
    if messages_of(text):
        raise BadRow(f"{name} begins with a human's turn")
    raise BadRow(f"{name} has further turns after the answer")
