"""Tool calls as a policy may write them, which is anyhow."""

import functools
import time

import pytest

from align.errors import ConfigError
from align.modeling.load import load_tokenizer
from align.rollout.types import Completion, Rollout, SamplingParams
from align.trainers.on_policy.environments import Environments
from align.trainers.on_policy.episodes import Episodes
from align.trainers.on_policy.tool_calls import (
    InMarks,
    read_args,
    read_function,
    read_json,
    read_keys,
    read_whole,
    written_calls,
)
from align.trainers.on_policy.tools import Tools
from tests.data.test_messages import ASKED
from tests.data.test_templates import family
from tests.modeling.tekken import needs_mistral_common, tekken
from tests.trainers.on_policy.talks import CHATML, Scripted, double, talking_tokenizer


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


def book(city: str, nights: int, options: dict, code: str, now: bool = True, note: str | None = "?") -> str:
    """Books a room.

    Args:
        city: where.
        nights: how many.
        options: more.
        code: a text of digits.
        now: at once.
        note: what else.
    """
    return "booked"


ARGUMENTS = {"city": "Rome\n  at the station\n", "nights": 2, "options": {"beds": [1, "x"]}, "code": "07", "now": True}
ARGUMENTS |= {"note": None}
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
    assert tools.read == InMarks(form) and tools.calls(answer) == [call] * 2
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


class CalledTool:
    def __call__(self, text: str) -> str:
        return text


def of_no_type(count: "Unknown") -> int:  # noqa: F821
    """Count.

    Args:
        count: how many
    """
    return count


@pytest.mark.parametrize(
    ("tool", "message"),
    [
        (functools.partial(double, 2), "functools.partial.* is none: write a def"),
        (CalledTool(), "CalledTool object .* is none: write a def"),
        ("double", "'double' is none: write a def"),
        (of_no_type, "tool of_no_type: name 'Unknown' is not defined"),
    ],
    ids=["partial", "object", "name", "unknown hint"],
)
def test_a_tool_of_which_no_schema_can_be_made(tool, message):
    with pytest.raises(ConfigError, match=message):
        Tools([tool], 5)


def test_a_template_that_leaves_tools_out_or_writes_calls_in_another_way():
    deaf = CHATML.replace("if tools", "if xml_tools").replace("in tools", "in xml_tools")
    other = CHATML.replace("{{ m.content }}", "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls }}{% endif %}")
    for template, message in ((deaf, "leaves tools out"), (other, "in another way")):
        with pytest.raises(ConfigError, match=message):
            Episodes(Environments(None, [double], 5), talking_tokenizer(template))


# ---- Llama 3 ---------------------------------------------------------------------------------------------------------

NUMBER = '{"name": "double", "parameters": {"number": "one"}}'


class Drawn(Scripted):
    """Answers with their end tokens, as a policy draws them."""

    def generate(self, prompts, params):
        answer = self.answers[len(self.asked)]
        self.asked.append([(self.tokenizer.decode(ids), own) for ids, own in zip(prompts, params, strict=True)])
        ids = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        return [Rollout(p, [Completion(ids, [-1.0] * len(ids), "stop")], 7) for p in prompts]


def talk(tokenizer, *answers, options=None, tools=(double,)):
    """A conversation of scripted answers with `tools`."""
    episodes = Episodes(Environments(None, list(tools), 5), tokenizer, template_options=options)
    asked = [{"role": "user", "content": "Twice one?"}]
    offered = {"tools": episodes.schemas, **(options or {})}
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False, **offered)
    row, engine = {"prompt": asked, "prompt_ids": ids, "row": 0}, Drawn(tokenizer, *answers)
    (found,) = episodes.complete(engine, [row], [SamplingParams(max_tokens=5000, seed=1)], [0])
    (completion,) = found.completions
    return completion, ids + completion.token_ids, offered


def called(name, arguments, result, **more):
    """Messages of a call and its result."""
    function = {"type": "function", "function": {"name": name, "arguments": arguments}}
    said = {"role": "assistant", "content": "", "tool_calls": [{**function, **more}]}
    return [said, {"role": "tool", "name": name, "content": result}]


@pytest.mark.parametrize("name", ["llama3_1", "llama3_2"])
@pytest.mark.parametrize("end", ["<|eot_id|>", "<|eom_id|>"])
@pytest.mark.parametrize("options", [{}, {"tools_in_user_message": False}, {"builtin_tools": ["code_interpreter"]}])
def test_a_call_of_llama(name, end, options):
    """Everything is as the template renders the conversation, but for the end that the policy drew."""
    tokenizer, answers = family(name), (NUMBER + end, "It is two.<|eot_id|>")
    completion, ids, offered = talk(tokenizer, *answers, options=options)
    drawn = [token for token, own in zip(completion.token_ids, completion.episode.policy_mask, strict=True) if own]
    assert tokenizer.decode(drawn) == "".join(answers)
    said = [*called("double", {"number": "one"}, "two"), {"role": "assistant", "content": "It is two."}]
    prompt = [{"role": "user", "content": "Twice one?"}]
    whole = tokenizer.apply_chat_template([*prompt, *said], tokenize=False, **offered)
    written = "<|eom_id|>" if "builtin_tools" in options and name == "llama3_1" else "<|eot_id|>"
    assert tokenizer.decode(ids) == whole.replace(NUMBER + written, NUMBER + end)
    assert completion.episode.calls == 1 and completion.episode.finished


PLAIN = [
    "It is two.", "", "{", "[1]", "{}", '{"name": "Rome", "parameters": {}}', '{"name": ["double"]}', "[" * 50_000,
    "{" * 50_000, f"I call {NUMBER}", f"<think>{NUMBER}</think>No.", '{"name":' + " " * 100_000,
]  # fmt: skip
ILL = [
    ('{"name": "double", "parameters": {', "no JSON"), ('{"name": "double", "parameters": [1]}', "a tool call is {"),
    (f"{NUMBER}; {NUMBER}", "make one call"), (f"{NUMBER} And now?", "make one call"),
    ("<|python_tag|>double.call(number='one')", "no JSON"), ('<|python_tag|>{"name": "none"}', "none not found"),
    ("<|python_tag|>3", "a tool call is {"), ('{"name": "double", "parameters": {"other": 1}}', "unexpected keyword"),
]  # fmt: skip


def test_an_answer_that_is_no_call_of_llama():
    tools = Tools([double], 5.0)
    tools.read = read_whole
    for answer in PLAIN:
        assert tools.calls(answer) == [], answer
    for answer, told in ILL:
        (call,) = tools.calls(answer)
        assert told in tools.answer(call)["content"]
    for answer in (
        NUMBER,
        f" {NUMBER}\n",
        f"<|python_tag|>{NUMBER}",
        NUMBER.replace('{"name', '{"type": "function", "name'),
    ):
        assert tools.calls(answer) == [{"name": "double", "arguments": {"number": "one"}}]


# ---- Mistral ---------------------------------------------------------------------------------------------------------

ARGS = '[TOOL_CALLS]double[ARGS]{"number": "one"}'


@needs_mistral_common
@pytest.mark.parametrize("answer", [ARGS, ARGS + ARGS])
def test_calls_of_mistral(answer, tmp_path):
    tokenizer = load_tokenizer(str(tekken(tmp_path, "v13")))
    answers = (f"{answer}</s>", "It is two.</s>")
    completion, ids, offered = talk(tokenizer, *answers)
    drawn = [token for token, own in zip(completion.token_ids, completion.episode.policy_mask, strict=True) if own]
    assert tokenizer.decode(drawn) == "".join(answers)
    said, result = called("double", {"number": "one"}, "two")
    count = completion.episode.calls
    said["tool_calls"] *= count
    messages = [
        {"role": "user", "content": "Twice one?"},
        said,
        *[result] * count,
        {"role": "assistant", "content": "It is two."},
    ]
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(messages, tokenize=False, **offered)
    assert count == answer.count("[ARGS]") and completion.episode.finished


def test_an_answer_that_is_no_call_of_mistral():
    mark, good = "[TOOL_CALLS]", {"name": "double", "arguments": {"number": "one"}}
    for answer in ("", "It is two.", NUMBER, f"[THINK]{ARGS}[/THINK]No.", f"[THINK]{ARGS}", "double[ARGS]{}"):
        assert read_args(answer, {}) == []
    for ill in (
        "",
        "double",
        "double[ARGS]",
        "double[ARGS][1]",
        "a b[ARGS]{}",
        "double[ARGS]{} And now?",
        "x[ARGS]" + "[" * 50_000,
    ):
        (call,) = read_args(mark + ill, {})
        assert "a tool call is [TOOL_CALLS]" in call
        assert read_args(ARGS + mark + ill, {}) == [good, call]
    held = '[TOOL_CALLS]double[ARGS]{"number": "[TOOL_CALLS]x[ARGS]"}'
    assert read_args(f"[THINK]Let me see.[/THINK]I ask.{held} {ARGS}", {}) == [
        {"name": "double", "arguments": {"number": "[TOOL_CALLS]x[ARGS]"}},
        good,
    ]


@needs_mistral_common
@pytest.mark.parametrize("version", ["v3", "v7", "v11"])
def test_mistral_up_to_version_11_is_refused_for_how_it_writes_calls(version, tmp_path):
    """Its templates want ids of calls, which said nothing of what to do."""
    with pytest.raises(ConfigError, match="in another way.*Mistral from version 13 on"):
        Episodes(Environments(None, [double], 5), load_tokenizer(str(tekken(tmp_path, version))))
