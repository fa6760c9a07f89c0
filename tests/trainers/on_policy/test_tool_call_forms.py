"""Calls of GPT-OSS, Gemma 4 and LFM2.5: conversations are what the templates render, and ill calls are answered."""

import time

import pytest

from align.trainers.on_policy.environments import Environments
from align.trainers.on_policy.episodes import Episodes
from align.trainers.on_policy.tool_call_forms import marked, read_channels, read_gemma, read_python
from tests.data.test_messages import ASKED
from tests.data.test_templates import family
from tests.trainers.on_policy.test_tools import ARGUMENTS, book, called, talk

FORMS = {"gptoss": read_channels}
FORMS |= dict.fromkeys(("diffusion_gemma", "gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4", "gemma4_v5"), read_gemma)
FORMS |= dict.fromkeys(("lfm2_2_5_vl", "lfm2_v2"), read_python)
GEMMA = '<|tool_call>call:double{number:<|"|>one<|"|>}<tool_call|>'
LFM = "<|tool_call_start|>[double(number='one')]<|tool_call_end|>"
CHANNEL = "<|channel|>commentary json<|message|>"
TO = f" to=functions.double{CHANNEL}"


@pytest.mark.parametrize(("name", "form"), FORMS.items())
def test_calls_are_read_as_the_template_writes_them(name, form):
    """Texts with line breaks, nested arguments, numbers, in the template's own form alone."""
    episodes = Episodes(Environments(None, [book], 5), family(name))
    tools = episodes.environments.kinds[None].start().tools
    call = {"name": "book", "arguments": ARGUMENTS}
    count = 1 if form is read_channels else 2  # GPT-OSS's template takes one
    said = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}] * count}
    text = episodes.tokenizer.apply_chat_template([ASKED, said], tools=tools.schemas, tokenize=False)
    answer = text[text.rindex("assistant" if form is not read_gemma else "model") :].removesuffix("<|call|>")
    assert tools.read is form and tools.calls(answer) == [call] * count
    for other in {read_channels, read_gemma, read_python} - {form}:
        assert other(answer, {}) == []


@pytest.mark.parametrize(
    ("name", "call", "end", "final"),
    [
        ("gptoss", f'{TO}{{"number": "one"}}', "<|call|>", "<|channel|>final<|message|>%s<|return|>"),
        ("gemma4", GEMMA, "<|tool_response>", "%s<turn|>"),
        ("gemma4_v5", GEMMA, "<|tool_response>", "%s<turn|>"),
        ("lfm2_2_5_vl", LFM, "<|im_end|>", "%s<|im_end|>"),
        ("lfm2_v2", LFM, "<|im_end|>", "%s<|im_end|>"),
    ],
)  # fmt: skip
def test_a_conversation_is_what_the_template_renders(name, call, end, final):
    tokenizer, said = family(name), {"role": "assistant", "content": "It is two."}
    answers = (call + end, final % "It is two.")
    completion, ids, offered = talk(tokenizer, *answers)
    drawn = [token for token, own in zip(completion.token_ids, completion.episode.policy_mask, strict=True) if own]
    assert tokenizer.decode(drawn) == "".join(answers)
    messages = [{"role": "user", "content": "Twice one?"}, *called("double", {"number": "one"}, "two"), said]
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(messages, tokenize=False, **offered).rstrip("\n")
    assert completion.episode.calls == 1 and completion.episode.finished


@pytest.mark.parametrize(
    ("name", "answers"),
    [
        (
            "gptoss",
            [
                "<|channel|>analysis<|message|>Twice.<|end|><|start|>assistant"
                '<|channel|>commentary to=functions.double <|constrain|>json<|message|>{"number": "one"}<|call|>',
                f"{TO}{{<|call|>",
                "<|channel|>final<|message|>two<|return|>",
            ],
        ),
        ("gemma4_v5", ["<|channel>thought\nTwice.<channel|>" + GEMMA * 2 + "<|tool_response>", "two<turn|>"]),
        ("lfm2_2_5", ["<think>\n" + LFM + "</think>" + LFM.replace("]", ", other()]") + "<|im_end|>", "two<|im_end|>"]),
    ],
)
def test_thoughts_several_calls_and_ill_ones_go_on(name, answers):
    completion, ids, _ = talk(family(name), *answers)
    assert (completion.episode.calls, completion.episode.finished) == (2, True)
    assert completion.episode.failed_calls == (name != "gemma4_v5")
    text = family(name).decode(ids)
    assert all(answer in text for answer in answers) and "two" in text.partition(answers[0])[2]


DOUBLE = {"name": "double", "arguments": {"number": "one"}}
NO_CALL = ["", "It is two.", '{"name": "double", "arguments": {"number": "one"}}', "double(number='one')"]


def test_what_is_no_call_of_gpt_oss():
    final = "<|channel|>final<|message|>"
    thought = f'<|channel|>analysis to=functions.double{CHANNEL}{{"number": "one"}}<|end|><|start|>assistant'
    for answer in (*NO_CALL, f"{final}to=functions.double", f"{thought}{final}It is two.", "<|start|>" * 20_000):
        assert read_channels(answer, {}) == []
    for header in ("to=functions.double", "to=double", "<|channel|>commentary to=functions.double <|constrain|>json"):
        assert read_channels(f'{header}<|message|>{{"number": "one"}}', {}) == [DOUBLE]
    for ill in ("", "<|message|>", "<|message|>{", "<|message|>[1]", "<|message|>" + "[" * 50_000):
        (call,) = read_channels(f"to=functions.double{ill}", {})
        assert "no JSON" in call or "a tool call is to=functions.NAME" in call


QUOTED = '<|"|>'


def test_calls_of_gemma():
    for answer in (*NO_CALL, GEMMA.removesuffix("<tool_call|>"), f"<|channel>thought\n{GEMMA}<channel|>No."):
        assert read_gemma(answer, {}) == []
    good = {
        "number:<|'|>one<|'|>": {"number": "one"}, "": {}, " number : <|'|>a, } b\n<|'|> , ": {"number": "a, } b\n"},
        "a:[1,[],{b:null,<|'|>c:d<|'|>:true}],e:-2.5e3": {"a": [1, [], {"b": None, "c:d": True}], "e": -2500.0},
        "city:New York": {"city": "New York"},
    }  # fmt: skip
    for written, arguments in good.items():
        text = "<|tool_call>call:double{" + written.replace("<|'|>", QUOTED) + "}<tool_call|>"
        assert read_gemma(f"<|channel>thought\nHm.<channel|>{text}{GEMMA}", {}) == [
            {"name": "double", "arguments": arguments},
            DOUBLE,
        ]
    start = time.monotonic()
    for ill in ("", "d{}", "call:{}", "call:d", "call:d{", "call:d{a", "call:d{a:", "call:a b{}", "call:d{}x",
                f"call:d{{a:{QUOTED}", "call:d{,}", "call:d{a:1 {}}", "call:d" + "{a:" * 50_000,
                "call:d{a:" + "[" * 50_000, "call:d{" + "a:1," * 20_000, "call:d{" + QUOTED * 20_000):  # fmt: skip
        (call,) = read_gemma(f"<|tool_call>{ill}<tool_call|>", {})
        assert "a tool call is call:NAME" in call
    assert time.monotonic() - start < 5


def test_calls_of_lfm():
    for answer in (*NO_CALL, LFM.removesuffix("<|tool_call_end|>"), f"<think>{LFM}</think>No."):
        assert read_python(answer, {}) == []
    for written in ("double(number='one')", '[double(number="one")]'):
        assert read_python(f"I ask. <|tool_call_start|>{written}<|tool_call_end|>", {}) == [DOUBLE]
    (call,) = read_python("<|tool_call_start|>[a.b(c=true, d=[null, {'e': -1}], f=False)]<|tool_call_end|>", {})
    assert call == {"name": "a.b", "arguments": {"c": True, "d": [None, {"e": -1}], "f": False}}
    start = time.monotonic()
    for ill in ("", "[]", "f", "f(1)", "f(*a)", "f(**{})", "f(a=one)", "f(a=f())", "f(a=1", "\x00",
                "f(a=" + "-" * 100_000 + "1)", "f(a=1" + "+1" * 50_000 + ")",
                "f(a=" + "[" * 50_000, "f" + ".a" * 50_000 + "(a=1)", f"f(a={'1' * 6000})", "[" * 50_000):  # fmt: skip
        (call,) = read_python(f"<|tool_call_start|>{ill}<|tool_call_end|>", {})
        assert "tool calls are [NAME(" in call
    assert time.monotonic() - start < 5


def test_marks_within_thoughts_that_have_ended_are_none():
    thoughts = ("<think>", "</think>")
    for answer, found in (
        ("(a)", ["a"]), ("(a)</think>(b)", ["b"]), ("<think>(a)</think>(b)<think>(c)</think>(d)(e", ["b", "d"]),
        ("<think>(a)", ["a"]), ("(" * 20_000, []), ("( a )" * 2, ["a", "a"]),
    ):  # fmt: skip
        assert marked(answer, "(", ")", thoughts) == found
