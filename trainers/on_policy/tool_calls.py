"""How a policy writes calls of tools, and how they are read.

A run reads the form in which the chat template itself writes a call. Between `<tool_call>` and `</tool_call>`:

    {"name": "weather", "arguments": {"city": "Rome"}}                      Qwen 2.5 and 3, Hermes
    <function=weather><parameter=city>Rome</parameter></function>           Qwen 3.5 and later, Qwen3-Coder, Nemotron 3
    weather<arg_key>city</arg_key><arg_value>Rome</arg_value>               GLM-4 MoE

without these marks:

    {"name": "weather", "parameters": {"city": "Rome"}}                     Llama 3.1, 3.2, 3.3: the whole answer
    [TOOL_CALLS]weather[ARGS]{"city": "Rome"}                               Mistral from version 13 on

and with marks of their own, in `tool_call_forms`: GPT-OSS, Gemma 4, LFM2.5.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from align.data.bad_rows import BadRow
from align.data.encode import render
from align.data.ending import ASKED, end_ids
from align.errors import ConfigError
from align.trainers.on_policy.tool_call_forms import (
    NAME,
    Call,
    marked,
    plain_value,
    read_channels,
    read_gemma,
    read_python,
)

OPEN, CLOSE, THOUGHTS = "<tool_call>", "</tool_call>", ("<think>", "</think>")
PYTHON = "<|python_tag|>"
MISTRAL, ARGS, THINK, THINK_END = "[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]"
PROBED = "probe_7319"
PROBED_CALL = {"name": PROBED, "arguments": {"first": "of two", "second": "more"}}
MISTRAL_FORM = "a tool call is [TOOL_CALLS]NAME[ARGS]{...}, the arguments as JSON, and only calls follow it"
BEGUN = re.compile(r'\{\s*"name"\s*:\s*"([^"]*)"')

Reader = Callable[[str, dict[str, dict]], list[Call]]
"""Reads the calls of an answer, in order. Its second argument: the functions' parameters by name, JSON schemas."""


@dataclass(frozen=True)
class InMarks:
    """Reads the calls between the marks. read: what stands between two, with the schemas."""

    read: Callable[[str, dict[str, dict]], Call]

    def __call__(self, answer: str, schemas: dict[str, dict]) -> list[Call]:
        return [self.read(found, schemas) for found in written_calls(answer)]


def written_calls(answer: str) -> list[str]:
    return marked(answer, OPEN, CLOSE, THOUGHTS)


def read_json(text: str, schemas: dict[str, dict]) -> Call:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:  # the latter for a thousand brackets
        return f"the tool call is no JSON: {error}"
    arguments = found.get("arguments", {}) if isinstance(found, dict) else None
    if not (isinstance(arguments, dict) and isinstance(found.get("name"), str)):
        return 'a tool call is {"name": ..., "arguments": {...}}'
    return {"name": readable(found["name"]), "arguments": arguments}


def read_function(text: str, schemas: dict[str, dict]) -> Call:
    name, named, inside = text.removeprefix("<function=").removesuffix("</function>").partition(">")
    marked = text.startswith("<function=") and text.endswith("</function>") and named
    values = _marked(inside, ("<parameter=", ">"), ("", "</parameter>")) if marked else None
    if values is None or not NAME.fullmatch(name.strip()):
        return "a tool call is <function=NAME>, for each argument <parameter=NAME>VALUE</parameter>, </function>"
    # the template writes a value on lines of its own
    own = {key: value.removeprefix("\n").removesuffix("\n") for key, value in values.items()}
    return {"name": name.strip(), "arguments": _typed(own, schemas.get(name.strip(), {}))}


def read_keys(text: str, schemas: dict[str, dict]) -> Call:
    name, mark, inside = text.partition("<arg_key>")
    values = _marked(mark + inside, ("<arg_key>", "</arg_key>"), ("<arg_value>", "</arg_value>"))
    if values is None or not NAME.fullmatch(name.strip()):
        return "a tool call is NAME, for each argument <arg_key>NAME</arg_key> and <arg_value>VALUE</arg_value>"
    return {"name": name.strip(), "arguments": _typed(values, schemas.get(name.strip(), {}))}


def _marked(text: str, key: tuple[str, str], value: tuple[str, str]) -> dict[str, str] | None:
    """The arguments' texts, each key and value between two marks; None where anything else stands there."""
    found: dict[str, str] = {}
    while text := text.lstrip():
        parts = []
        for before, after in (key, value):
            text = text.lstrip() if before else text
            part, closed, rest = text[len(before) :].partition(after)
            if not (text.startswith(before) and closed):
                return None
            parts.append(part)
            text = rest
        found[parts[0].strip()] = parts[1]
    return found


def _typed(values: dict[str, str], schema: dict) -> dict[str, Any]:
    """Arguments that were written without quotes: texts where the function takes a text (and no None that templates
    write as null or None), else what JSON reads."""
    kinds = schema.get("properties", {})

    def value(text: str, kind: dict) -> Any:
        none = kind.get("nullable") and text in ("null", "None")
        return text if kind.get("type") == "string" and not none else plain_value(text)

    return {name: value(text, kinds.get(name, {})) for name, text in values.items()}


def read_whole(answer: str, schemas: dict[str, dict]) -> list[Call]:
    """The call that an answer of Llama 3 is. JSON is an answer like others unless it names a tool, or stands after the
    mark of a call, which the model writes where it sees fit. Llama's templates take one call of an answer."""
    text = answer.strip()
    marked, text = text.startswith(PYTHON), text.removeprefix(PYTHON).lstrip()
    found, reason, end = None, 'a tool call is {"name": ..., "parameters": {...}}', len(text)
    try:
        found, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError) as error:
        reason = f"the tool call is no JSON: {error}"
    begun = BEGUN.match(text)
    name = found.get("name") if isinstance(found, dict) else begun and begun[1]
    if not marked and not (isinstance(name, str) and name in schemas):
        return []
    arguments = found.get("parameters", found.get("arguments", {})) if isinstance(found, dict) else None
    if not (isinstance(arguments, dict) and isinstance(name, str)):
        return [reason]
    if text[end:].strip():
        return ["a tool call is the whole answer, and more follows it: make one call, and wait for its result"]
    return [{"name": readable(name), "arguments": arguments}]


def read_args(answer: str, schemas: dict[str, dict]) -> list[Call]:
    """The calls of an answer of Mistral, which follow what it says. JSON is read to its end, as a text in it may hold
    the mark of a call."""
    if THINK in answer:
        answer = answer.partition(THINK_END)[2]
    found: list[Call] = []
    rest = answer.partition(MISTRAL)[2] if MISTRAL in answer else None
    while rest is not None:
        name, mark, text = rest.partition(ARGS)
        text = text.lstrip()
        try:
            arguments, end = json.JSONDecoder().raw_decode(text)
        except (ValueError, RecursionError):
            arguments, end = None, 0
        after = text[end:].lstrip()
        good = mark and isinstance(arguments, dict) and NAME.fullmatch(name.strip())
        if not good or (after and not after.startswith(MISTRAL)):
            return [*found, MISTRAL_FORM]
        found.append({"name": name.strip(), "arguments": arguments})
        rest = after.removeprefix(MISTRAL) if after else None
    return found


FORMS: tuple[Reader, ...] = (
    InMarks(read_json),
    InMarks(read_function),
    InMarks(read_keys),
    read_whole,
    read_args,
    read_channels,
    read_gemma,
    read_python,
)


def reader_for(tokenizer, schemas: list[dict]) -> Reader:
    """What reads calls as the chat template writes them. schemas: of the tools. ConfigError where nothing here does,
    or where the template leaves the tools out."""
    others = "use a model whose template does, or an environment that reads the calls itself"
    asked = _rendered(tokenizer, [ASKED], schemas)
    if not all(schema["function"]["name"] in asked for schema in schemas):
        raise ConfigError(f"the chat template leaves tools out, so that the policy would not see them: {others}")
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": PROBED_CALL}]}
    written = _rendered(tokenizer, [ASKED, call], schemas)
    if PROBED not in written and OPEN in tokenizer.get_chat_template(tools=schemas):
        return InMarks(read_json)  # it knows calls as what the policy wrote alone, and asks for JSON
    answer = written.removeprefix(_rendered(tokenizer, [ASKED], schemas, answer_next=True)).rstrip()
    for token in tokenizer.convert_ids_to_tokens(list(end_ids(tokenizer))):
        answer = answer.removesuffix(token)
    for form in FORMS:
        # some templates start an answer in another way than they ask for one
        if any(form(text, {PROBED: {}})[-1:] == [PROBED_CALL] for text in (answer, written)):
            return form
    raise ConfigError(
        "this chat template writes tool calls in another way than those that are read here (Qwen, GLM-4, Nemotron 3, "
        f"Hermes, Llama 3.1 to 3.3, Mistral from version 13 on, GPT-OSS, Gemma 4, LFM2.5): {others}"
    )


def _rendered(tokenizer, messages: list[dict], schemas: list[dict], answer_next: bool = False) -> str:
    try:
        return render(messages, tokenizer, {"tools": schemas}, answer_next)
    except BadRow:
        return ""


def readable(text: str) -> str:
    """Without halves of surrogate pairs, which JSON can name and no tokenizer reads."""
    return text.encode("utf-8", "replace").decode("utf-8")
