"""Tool calls as a policy may write them, which is anyhow."""

import time

import pytest

from align.trainers.on_policy.tools import Tools, written_calls


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
