"""Messages as other collections and chat templates have them: `from` and `value`, calls of tools, `tools`."""

import json
import re
from typing import Any

from align.data.bad_rows import BadRow
from align.data.today import strftime_now, writes_date

OTHER_CALLS = ("function_call", "tool_call")
"""Roles of an assistant's call of a tool in ShareGPT's format and ms-swift's, as JSON in the text: no chat template
knows them."""
SPEAKERS = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "observation": "tool", "function_response": "tool", "tool_response": "tool",
}  # fmt: skip
"""What ShareGPT and its kin call the roles."""
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Keys of a message that hold what the assistant thought before it answered."""
TAGS = re.compile(r"</?think>|<\|channel>(?:thought)?|<channel\|>")
"""What stands around thoughts in the text of an answer."""
FINAL = "<|channel|>final<|message|>"
PROBED = "probe_7319"
SYSTEM_APART = "; where it takes no system message, put that text at the start of the first user message"
PROBED_CALL = {"type": "function", "function": {"name": PROBED, "arguments": {}}}
PROBED_TOOL = {
    "type": "function",
    "function": {"name": PROBED, "description": "A probe.", "parameters": {"type": "object", "properties": {}}},
}
HOLDERS = ("prompt", "completion", "chosen", "rejected", "messages", "conversations")


def with_roles(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose messages with `from` and `value` have `role` and `content` instead, the roles by their usual names;
    the column `conversations` is `messages`. (TRL's SFT does so too, and keeps the names of the roles.)"""
    renamed = {name: _with_roles(value) if name in HOLDERS else value for name, value in row.items()}
    if "conversations" in renamed and "messages" not in renamed:
        renamed["messages"] = renamed["conversations"]
    return renamed


def _with_roles(messages: Any) -> Any:
    return [with_role(message) for message in messages] if isinstance(messages, list) else messages


def with_role(message: Any) -> Any:
    """A message with `role` and `content` that had `from` and `value`; any other value as it is."""
    if not isinstance(message, dict) or message.get("from") is None or message.get("role") is not None:
        return message
    kept = {key: item for key, item in message.items() if key not in ("from", "value")}
    return {**kept, "role": SPEAKERS.get(message["from"], message["from"]), "content": message.get("value")}


def by_role(feature: Any) -> Any:
    """The feature of a column of `datasets` once its messages are those of `with_role`."""
    from datasets import LargeList, List

    keys = feature.feature if isinstance(feature, List | LargeList) else None
    if not isinstance(keys, dict) or not {"from", "value"} <= keys.keys():
        return feature
    kept = {key: kind for key, kind in keys.items() if key not in ("from", "value")}
    return List({"role": keys["from"], "content": keys["value"], **kept})


def answered(text: str) -> dict[str, Any]:
    """The message of an answer that a policy wrote, for a conversation that goes on. Of GPT-OSS it is what the last
    channel says to the user: its template refuses a text with channels, and leaves out earlier thoughts itself."""
    return {"role": "assistant", "content": text.rpartition(FINAL)[2]}


def trained(message: dict[str, Any]) -> bool:
    """Whether a message of a demonstration is trained: the assistant's, but for those of `weight` 0 (OpenAI's key)."""
    return message["role"] == "assistant" and message.get("weight") != 0


# ---- tools -----------------------------------------------------------------------------------------------------------


def tools_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The functions of the column `tools` (their JSON schemas, or the list's JSON text), as chat templates take them;
    [] without any. BadRow for anything else."""
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = _parsed(tools, "tools")
    if not tools:
        return []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) and _named(tool) for tool in tools):
        raise BadRow("tools is no list of functions, each a JSON schema with a name")
    return without_none(tools)


def check_calls(message: dict[str, Any], name: str) -> None:
    """BadRow for `tool_calls` that no template could render. name: of the column."""
    calls = message["tool_calls"]
    if message.get("role") != "assistant":
        raise BadRow(f"{name} has tool calls in a message that is not the assistant's")
    if not isinstance(calls, list) or not all(isinstance(call, dict) and _named(call) for call in calls):
        raise BadRow(f"{name} has tool calls without the name of a function")


def refuse_calls(reason: str, **texts: Any) -> None:
    """BadRow where messages call tools, in a place where nothing would render or offer these."""
    for name, messages in texts.items():
        if any(message.get("tool_calls") for message in messages):
            raise BadRow(f"{name} has tool calls, and {reason}")


def refuse_unknown_tools(messages: list[dict[str, Any]], tools: Any, tokenizer: Any) -> None:
    """BadRow for tools and calls that the chat template would leave out without a word."""
    given = {"tools": bool(tools), "tool_calls": any("tool_calls" in message for message in messages)}
    if not any(given.values()):
        return
    template = tokenizer.get_chat_template(tools=tools)
    for name, there in given.items():
        if there and (name not in template or _shows(tokenizer, name, template) is False):
            other = ", or, for this one, xml_tools in chat_template_kwargs" if "xml_tools" in template else ""
            raise BadRow(
                f"the chat template renders no {name}: use the tokenizer of a model that was trained with tools"
                + other * (name == "tools")
            )


def refuse_left_out(messages: list[dict[str, Any]], text: str) -> None:
    """BadRow for thoughts of answers that are trained which the template has left out of `text`. Those of earlier
    answers it may leave out, as it does when the model is asked."""
    for message in messages:
        thoughts = [("thoughts", part) for part in TAGS.split(message["content"])[:-1]]
        for name, value in [*thoughts, *((name, message.get(name)) for name in THOUGHTS)]:
            if isinstance(value, str) and value.strip() not in text:
                raise BadRow(
                    f"the chat template leaves out the {name} of an answer, which would be trained without: remove "
                    "them, put them where the template takes thoughts from, or set another chat template, for example "
                    "with trl.get_training_chat_template, which `align sft` does with assistant_only_loss: true"
                )


def refuse_dropped(messages: list[dict[str, Any]], text: str, tokenizer: Any, options: dict[str, Any]) -> None:
    """BadRow for a message that the chat template has left out of `text` whole, as those of Qwen do with roles that
    they do not know (`developer`): the row would be trained, or asked, without it."""
    for index, message in enumerate(messages):
        if message["content"].strip() in text:
            continue
        # what is said may be changed, as earlier thoughts are; would other words of this message be shown?
        probed = [*messages[:index], {**message, "content": PROBED}, *messages[index + 1 :]]
        try:
            shown = PROBED in applied(tokenizer, probed, **options)
        except BadRow:
            shown = True
        if not shown:
            hint = SYSTEM_APART if message["role"] == "system" else ""
            raise BadRow(
                f"the chat template leaves out a message of the role {message['role']} (write it with a role, and in a "
                f"place, that the template renders, or set another template){hint}"
            )


def applied(tokenizer: Any, messages: list[dict[str, Any]], *, tokenize: bool = False, **options: Any) -> Any:
    """`apply_chat_template`, with messages as the template takes them; BadRow for what it cannot render."""
    messages = for_template(messages)
    if _takes_parts(tokenizer):
        messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    if writes_date(tokenizer):
        options = {"strftime_now": strftime_now, **options}
    try:
        return tokenizer.apply_chat_template(messages, tokenize=tokenize, **options)
    except _refusals() as error:
        kind = "" if isinstance(error, _refusals()[0]) else f"{type(error).__name__}: "
        hint = SYSTEM_APART if any(message["role"] == "system" for message in messages) else ""
        raise BadRow(f"the chat template refuses the messages ({kind}{error}){hint}") from error


def _takes_parts(tokenizer: Any) -> bool:
    """Whether a chat template leaves out content that is text, and takes lists of parts alone: those of some models
    for images do (SmolVLM, Idefics3, LLaVA)."""
    return not _shows(tokenizer, "text") and bool(_shows(tokenizer, "parts"))


_SHOWN: dict[tuple[str, str], bool | None] = {}


def _shows(tokenizer: Any, kind: str, template: str | None = None) -> bool | None:
    """Whether the chat template renders content that is a text, that is parts, tool_calls, tools; None where it
    refuses the message. template: of several, the one that is used with tools."""
    key = template or str(tokenizer.chat_template), kind
    if key not in _SHOWN:
        content: Any = {"parts": [{"type": "text", "text": PROBED}], "text": PROBED}.get(kind, "Hi")
        messages = [{"role": "user", "content": content}]
        if kind == "tool_calls":
            call = {"id": "probe0001", **PROBED_CALL}
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        options: dict[str, Any] = {"chat_template": template}
        if kind == "tools":
            options["tools"] = [PROBED_TOOL]
        try:
            _SHOWN[key] = PROBED in tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except _refusals():
            _SHOWN[key] = None
    return _SHOWN[key]


def _refusals() -> tuple[type[Exception], ...]:
    """What templates raise on purpose, and where they meet what they were not written for."""
    from jinja2 import TemplateError

    return TemplateError, TypeError, ValueError, AttributeError, LookupError


def for_template(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages as templates take them: calls without the None that Arrow fills in for keys of other rows, and with
    their arguments as a mapping (of JSON text, which a template would quote once more)."""
    if not any("tool_calls" in message for message in messages):
        return messages
    return [
        {**message, "tool_calls": [_call(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in messages
    ]


def without_none(value: Any) -> Any:
    """A copy of nested lists and mappings without what is None."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, list) else value


def _call(call: dict[str, Any]) -> dict[str, Any]:
    call = without_none(call)
    function = call.get("function", call)
    if isinstance(function.get("arguments"), str):
        arguments = _parsed(function["arguments"], "the arguments of a tool call")
        if not isinstance(arguments, dict):
            raise BadRow("the arguments of a tool call are no JSON object")
        function = {**function, "arguments": arguments}
    return {**call, "function": function} if "function" in call else function


def _named(entry: dict[str, Any]) -> bool:
    function = entry.get("function") or entry
    return isinstance(function, dict) and isinstance(function.get("name"), str) and bool(function["name"])


def _parsed(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise BadRow(f"{what}: no valid JSON") from error
