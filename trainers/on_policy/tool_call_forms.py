"""Calls of tools that are written with tokens of their own: GPT-OSS, Gemma 4, LFM2.5.

    <|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Rome"}
    <|tool_call>call:weather{city:<|"|>Rome<|"|>,days:2}<tool_call|>
    <|tool_call_start|>[weather(city="Rome", days=2)]<|tool_call_end|>

Each reader takes an answer without its end token, and returns its calls in order; a text says why one is none.
"""

import ast
import json
import re
from typing import Any

NAME = re.compile(r"[\w.:/-]+")
OTHERS = {"True": True, "False": False, "None": None}
"""Values that templates do not write as JSON does."""
NAMED = OTHERS | {"true": True, "false": False, "null": None}
START, MESSAGE, RECIPIENT = "<|start|>", "<|message|>", re.compile(r"\bto=(?:functions\.)?([\w.:/-]+)")
CHANNEL_FORM = "a tool call is to=functions.NAME and the channel commentary, <|message|>, the arguments as JSON: {...}"
QUOTE = '<|"|>'
GEMMA, GEMMA_END = "<|tool_call>", "<tool_call|>"
GEMMA_FORM = f"a tool call is call:NAME{{argument:value,...}}, texts between two {QUOTE}"
LFM, LFM_END = "<|tool_call_start|>", "<|tool_call_end|>"
LFM_FORM = "tool calls are [NAME(argument=value, ...), ...], with names and values as Python writes them"
Call = dict[str, Any] | str
"""A call's name and arguments; a text that says why it is none."""


def marked(answer: str, begin: str, end: str, thoughts: tuple[str, str]) -> list[str]:
    """What stands between the marks `begin` and `end`, in order, outside of thoughts that have ended. thoughts: their
    own marks; the first of them may stand in the prompt.

    Not by a regular expression, which takes hours for a mark and the few thousand blanks that a policy may write."""
    opened, closed = thoughts
    begun = answer.partition(closed)[2] if closed in answer else answer
    parts = [part.partition(closed) for part in begun.split(opened)]
    text = "".join(rest if mark else part for part, mark, rest in parts)
    found, place = [], 0
    while (start := text.find(begin, place)) >= 0 and (stop := text.find(end, start)) >= 0:
        found.append(text[start + len(begin) : stop].strip())
        place = stop + len(end)
    return found


def read_channels(answer: str, schemas: dict[str, dict]) -> list[Call]:
    """The call that ends an answer of GPT-OSS: its last message, if that is to somebody. The recipient stands before
    the channel or after it. Its template takes one call of an answer."""
    header, mark, text = answer.rpartition(START)[2].partition(MESSAGE)
    recipient = RECIPIENT.search(header)
    if not recipient:
        return []
    try:
        arguments = json.loads(text) if mark else None
    except (ValueError, RecursionError) as error:
        return [f"the arguments of the tool call are no JSON: {error}"]
    return [{"name": recipient[1], "arguments": arguments}] if isinstance(arguments, dict) else [CHANNEL_FORM]


def read_gemma(answer: str, schemas: dict[str, dict]) -> list[Call]:
    return [_gemma_call(text) for text in marked(answer, GEMMA, GEMMA_END, ("<|channel>", "<channel|>"))]


def _gemma_call(text: str) -> Call:
    name, brace, _ = text.removeprefix("call:").partition("{")
    try:
        arguments, end = _gemma_value(text, len(text) - len(text.removeprefix("call:")) + len(name))
    except (ValueError, RecursionError):
        return GEMMA_FORM
    whole = text.startswith("call:") and brace and end == len(text) and NAME.fullmatch(name)
    return {"name": name, "arguments": arguments} if whole else GEMMA_FORM


def _gemma_value(text: str, at: int) -> tuple[Any, int]:
    """The value at a place of a text, and where it ends. ValueError where there is none."""
    if text.startswith(QUOTE, at):
        end = text.index(QUOTE, at + len(QUOTE))
        return text[at + len(QUOTE) : end], end + len(QUOTE)
    if text[at : at + 1] in ("{", "["):
        return _gemma_items(text, at + 1, named=text[at] == "{")
    end = at
    while end < len(text) and text[end] not in ",}]":
        end += 1
    return plain_value(text[at:end].strip()), end


def _gemma_items(text: str, at: int, named: bool) -> tuple[Any, int]:
    """What follows an opening bracket, up to the closing one. named: a key before each value."""
    close, keys, values = "}" if named else "]", [], []
    at = _past_blanks(text, at)
    while text[at : at + 1] != close:
        if named:
            quoted = text.startswith(QUOTE, at)
            colon = text.index(":", text.index(QUOTE, at + len(QUOTE)) if quoted else at)
            keys.append(text[at:colon].strip().removeprefix(QUOTE).removesuffix(QUOTE))
            at = _past_blanks(text, colon + 1)
        value, at = _gemma_value(text, at)
        values.append(value)
        at = _past_blanks(text, at)
        if text[at : at + 1] == ",":
            at = _past_blanks(text, at + 1)
        elif text[at : at + 1] != close:
            raise ValueError(GEMMA_FORM)
    return (dict(zip(keys, values, strict=True)) if named else values), at + 1


def _past_blanks(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def plain_value(text: str) -> Any:
    """A value that was written without quotes: what JSON reads, else the text itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return OTHERS.get(text.strip(), text)


def read_python(answer: str, schemas: dict[str, dict]) -> list[Call]:
    """Calls of LFM2.5: one mark holds a list of them, or a single one."""
    return [call for text in marked(answer, LFM, LFM_END, ("<think>", "</think>")) for call in _python_calls(text)]


def _python_calls(text: str) -> list[Call]:
    try:
        tree = ast.parse(text, mode="eval").body
        nodes = tree.elts if isinstance(tree, ast.List) else [tree]
        return [_python_call(node) for node in nodes] or [LFM_FORM]
    except (ValueError, SyntaxError, RecursionError, MemoryError):  # the last for a thousand brackets
        return [LFM_FORM]


def _python_call(node: ast.AST) -> Call:
    if not isinstance(node, ast.Call) or node.args or any(keyword.arg is None for keyword in node.keywords):
        return LFM_FORM
    arguments = {str(keyword.arg): ast.literal_eval(_Named().visit(keyword.value)) for keyword in node.keywords}
    return {"name": ast.unparse(node.func), "arguments": arguments}


class _Named(ast.NodeTransformer):
    """Reads true, false and null as the values that they are in JSON."""

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.copy_location(ast.Constant(NAMED[node.id]), node) if node.id in NAMED else node
