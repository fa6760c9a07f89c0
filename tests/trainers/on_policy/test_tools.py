"""Tool calls as a policy may write them, which is anyhow."""

import time

import pytest

from align.errors import ConfigError
from align.trainers.on_policy.environments import Environments
from align.trainers.on_policy.episodes import Episodes
from align.trainers.on_policy.tool_calls import read_function, read_json, read_keys, written_calls
from align.trainers.on_policy.tools import Tools
from tests.data.test_messages import ASKED
from tests.data.test_templates import family
from tests.trainers.on_policy.talks import CHATML, double, talking_tokenizer


def echo(text: str) -> str:
    """Says it again, or leaves, or counts further than can be written.

    Args:
        text: what.
    """
    if text == "leave":
        raise SystemExit
    return 10**5000 if text == "count" else text


HOSTILE_CALLS = [
    ("[" * 50_000, "maximum recursion depth"),
    ('{"name": "\\ud83d", "arguments": {}}', "Tool ? not found."),
    ('{"name": "echo", "arguments": {"text": "a\\ud83d"}}', "a?"),
    ('{"name": "echo", "arguments": {"text": "leave"}}', "'error': ''"),
    ('{"name": "echo", "arguments": {"text": "count"}}', "Exceeds the limit"),
    ('{"name": "echo", "arguments": {"self": 1}}', "unexpected keyword argument"),
    ('{"name": "echo", "arguments": null}', "a tool call is"),
    ("\x00", "no JSON"),
]


@pytest.mark.parametrize("written, told", HOSTILE_CALLS)
def test_a_call_of_any_kind_is_answered(written, told):
    """In text that a tokenizer reads, which half a surrogate pair is not."""
    tools = Tools([echo], 5.0)
    (call,) = tools.calls(f"<tool_call>{written}</tool_call>")
    message = tools.answer(call)
    assert told in message["content"] and all(text.encode() for text in message.values())


def test_calls_are_found_in_time():
    start = time.monotonic()
    for answer in ("<tool_call>" + " " * 100_000, "<tool_call>" * 20_000, "<tool_call> </tool_call>" * 20_000):
        assert len(written_calls(answer)) == answer.count("</tool_call>")
    assert time.monotonic() - start < 5  # a regular expression took 9 for 2,000 blanks, and eight times that for 4,000


# ---- as templates write calls ----------------------------------------------------------------------------------------


def book(city: str, nights: int, options: dict, code: str, now: bool = True) -> str:
    """Books a room.

    Args:
        city: where.
        nights: how many.
        options: more.
        code: a text of digits.
        now: at once.
    """
    return "booked"


ARGUMENTS = {"city": "Rome\n  at the station\n", "nights": 2, "options": {"beds": [1, "x"]}, "code": "07", "now": True}
FORMS = {"qwen3_training": read_json, "glm4moe_training": read_keys}
FORMS |= dict.fromkeys(("qwen3_5_think_training", "nemotron_3_nano_training"), read_function)


@pytest.mark.parametrize(("name", "form"), FORMS.items())
def test_calls_are_read_as_the_template_writes_them(name, form):
    """In its own form alone: a call in another one would not be one where the model is served."""
    environments = Environments(None, [book], 5)
    (kind,), tokenizer = environments.kinds.values(), Episodes(environments, family(name)).tokenizer
    tools = kind.start().tools
    call = {"name": "book", "arguments": ARGUMENTS}
    said = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}] * 2}
    text = tokenizer.apply_chat_template([ASKED, said], tools=tools.schemas, tokenize=False)
    answer = text[text.rindex("assistant") :].rpartition("</think>")[2]
    assert tools.read is form and tools.calls(answer) == [call] * 2
    assert tools.calls(f"<think>{answer}</think>No.") == []
    for other in {read_json, read_function, read_keys} - {form}:
        assert all(isinstance(other(found, {}), str) for found in written_calls(answer))


@pytest.mark.parametrize(
    "written",
    ["", "<function=>", "<function=a>", "<function=a>{}</function>", "<function=a><parameter=b>1</function>",
     "<function=a><parameter=b", "<function", "</function>"],
)  # fmt: skip
def test_a_call_that_is_no_function(written):
    assert "a tool call is <function=NAME>" in read_function(written, {})


@pytest.mark.parametrize(
    "written", ["", "a b", "{}", "a<arg_key>b</arg_key>", "a<arg_key>b</arg_key>c<arg_value>1</arg_value>"]
)
def test_a_call_without_its_keys(written):
    assert "a tool call is NAME" in read_keys(written, {})


def test_a_template_that_leaves_tools_out_or_writes_calls_in_another_way():
    deaf = CHATML.replace("if tools", "if xml_tools").replace("in tools", "in xml_tools")
    other = CHATML.replace("{{ m.content }}", "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls }}{% endif %}")
    for template, message in ((deaf, "leaves tools out"), (other, "in another way")):
        with pytest.raises(ConfigError, match=message):
            Episodes(Environments(None, [double], 5), talking_tokenizer(template))
