"""Tools, their calls, and messages with `from` and `value`, in the templates that TRL ships."""

import json
from itertools import compress
from pathlib import Path

import pytest
import trl
from datasets import Dataset

import align.data
from align.data import tokenize_completions, tokenize_pairs, tokenize_prompts
from align.data.turns import tokenize_turns
from align.errors import DataError
from align.trainers.core.loading import training_tokenizer
from align.trainers.pairs.data import IDS, numbered_pairs

TOOLS = [
    {"type": "function", "function": {"name": name, "description": name, "parameters": {
        "type": "object", "properties": {key: {"type": "string", "description": key}}, "required": [key]}}}
    for name, key in (("weather", "city"), ("clock", "zone"))
]  # fmt: skip
ASKED = {"role": "user", "content": "What is the weather in Rome?"}
ANSWER = {"role": "assistant", "content": "Sunny in Rome."}
CALL = {"role": "assistant", "content": "", "tool_calls": [
    {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}]}  # fmt: skip
RESULT = {"role": "tool", "name": "weather", "content": "sun, 25 degrees"}
TALK = [ASKED, CALL, RESULT, ANSWER]


def template(family):
    return (Path(trl.__file__).parent / "chat_templates" / f"{family}.jinja").read_text(encoding="utf-8")


@pytest.fixture
def tool_tokenizer(make_tokenizer):
    return make_tokenizer(eos="<|im_end|>", template=template("qwen2_5"))


def test_calls_are_trained_and_what_tools_say_is_not(tool_tokenizer):
    # of one type of row each, as Arrow stores them: with None for the keys of the other tool, or as JSON text
    written = [{**m, "tool_calls": [{"function": {"name": "weather", "arguments": '{"city": "Rome"}'}}]}
               if "tool_calls" in m else m for m in TALK]  # fmt: skip
    for tools, talk in ((TOOLS, TALK), (json.dumps(TOOLS), written)):
        (row,) = tokenize_completions(
            Dataset.from_list([{"messages": talk, "tools": tools}]), tool_tokenizer, max_length=None
        )
        whole = tool_tokenizer.apply_chat_template(TALK, tools=TOOLS, tokenize=False).rstrip()
        assert tool_tokenizer.decode(row["input_ids"]) == whole
        trained = [t for t, m in zip(row["input_ids"], row["completion_mask"], strict=True) if m]
        call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>'
        assert tool_tokenizer.decode(trained) == f"{call}Sunny in Rome.<|im_end|>"


def test_a_reward_model_reads_answers_with_tools(tool_tokenizer):
    row = {"prompt": [ASKED], "chosen": [CALL, RESULT, ANSWER], "rejected": [ANSWER], "tools": TOOLS}
    (found,) = tokenize_pairs(Dataset.from_list([row]), tool_tokenizer, max_length=None, scored=True)
    for name in ("chosen", "rejected"):
        whole = tool_tokenizer.apply_chat_template([ASKED, *row[name]], tools=TOOLS, tokenize=False).rstrip()
        assert tool_tokenizer.decode(found["prompt_ids"] + found[f"{name}_ids"]) == whole
    row["rejected"] = [ANSWER, ASKED]
    with pytest.raises(DataError, match="rejected does not end with an assistant message"):
        tokenize_pairs(Dataset.from_list([row]), tool_tokenizer, max_length=None, scored=True)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tools": "{'a'"}, "tools: no valid JSON"),
        ({"tools": [{"type": "function"}]}, "tools is no list of functions"),
        ({"completion": [{**CALL, "role": "user"}, ANSWER]}, "a message that is not the assistant's"),
        ({"completion": [{**CALL, "tool_calls": [{"id": "1"}]}]}, "tool calls without the name of a function"),
        ({"completion": [{**CALL, "tool_calls": [{"name": "f", "arguments": "[1]"}]}]}, "are no JSON object"),
    ],
)
def test_what_is_no_tool(tool_tokenizer, change, reason):
    rows = Dataset.from_list([{"prompt": [ASKED], "completion": [CALL], "tools": TOOLS} | change])
    with pytest.raises(DataError, match=reason):
        tokenize_completions(rows, tool_tokenizer, max_length=None)


def test_a_message_that_the_template_leaves_out(tool_tokenizer):
    """Qwen's templates pass over roles that they do not know: rows were trained without it."""
    developer = {"role": "developer", "content": "Answer in one word."}
    said = "the chat template leaves out a message of the role developer"
    rows = Dataset.from_list([{"messages": [developer, ASKED, ANSWER], "prompt": [developer, ASKED]}])
    with pytest.raises(DataError, match=said):
        tokenize_completions(rows.remove_columns("prompt"), tool_tokenizer, max_length=None)
    with pytest.raises(DataError, match=said):
        tokenize_prompts(rows.remove_columns("messages"), tool_tokenizer, max_prompt_length=None)
    pair = {"prompt": [developer, ASKED], "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "Rain."}]}
    with pytest.raises(DataError, match=said):
        tokenize_pairs(Dataset.from_list([pair]), tool_tokenizer, max_length=None)
    (row,) = tokenize_completions(
        Dataset.from_list([{"messages": [{**developer, "role": "system"}, ASKED, ANSWER]}]),
        tool_tokenizer,
        max_length=None,
    )
    assert "Answer in one word." in tool_tokenizer.decode(row["input_ids"])


def test_a_call_in_the_format_of_sharegpt_is_refused(chat_tokenizer):
    """It was context: what the assistant called was not trained."""
    talk = [("human", "Rome?"), ("function_call", '{"name": "weather"}'), ("observation", "sun"), ("gpt", "Sunny.")]
    rows = Dataset.from_list([{"conversations": [{"from": who, "value": what} for who, what in talk]}])
    with pytest.raises(
        DataError, match="role function_call, which would not be trained: write the call into tool_calls"
    ):
        tokenize_completions(rows, chat_tokenizer, max_length=None)


def test_tools_that_a_template_would_leave_out(chat_tokenizer):
    rows = Dataset.from_list([{"messages": [ASKED, ANSWER], "tools": TOOLS}])
    with pytest.raises(DataError, match="the chat template renders no tools"):
        tokenize_completions(rows, chat_tokenizer, max_length=None)
    with pytest.raises(DataError, match="prompt has tool calls, and rollouts offer none"):
        tokenize_prompts(Dataset.from_list([{"prompt": TALK[:3]}]), chat_tokenizer, max_prompt_length=None)


def test_tools_under_another_name(make_tokenizer):
    """SmolLM3's first template offers `xml_tools`, whose name holds the word, and leaves `tools` out."""
    tokenizer = make_tokenizer(eos="<|im_end|>", template=template("qwen2_5").replace("if tools", "if xml_tools"))
    row = {"messages": [ASKED, ANSWER], "tools": TOOLS}
    with pytest.raises(DataError, match="renders no tools: .*, or, for this one, xml_tools in chat_template_kwargs"):
        tokenize_completions(Dataset.from_list([row]), tokenizer, max_length=None)


def test_a_template_for_tools_beside_another(make_tokenizer, tool_tokenizer):
    """As Hermes 2 has them: the one for tools renders rows with tools, whatever the other knows."""
    both = {"default": tool_tokenizer.chat_template.replace("tool_calls", "no_calls"), "tool_use": template("qwen2_5")}
    tokenizer = make_tokenizer(eos="<|im_end|>", template=both)
    (row,) = tokenize_completions(Dataset.from_list([{"messages": TALK, "tools": TOOLS}]), tokenizer, max_length=None)
    whole = tool_tokenizer.apply_chat_template(TALK, tools=TOOLS, tokenize=False).rstrip()
    assert tokenizer.decode(row["input_ids"]) == whole


def test_from_and_value(chat_tokenizer):
    talk = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]
    usual = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    (one,), (other,) = (
        tokenize_completions(Dataset.from_list([row]), chat_tokenizer, max_length=None)
        for row in ({"conversations": talk}, {"messages": usual})
    )
    assert one["input_ids"] == other["input_ids"] and one["completion_mask"] == other["completion_mask"]
    with pytest.raises(DataError, match="conversations is text that should be messages"):
        tokenize_completions(Dataset.from_list([{"conversations": json.dumps(talk)}]), chat_tokenizer, max_length=None)


@pytest.mark.parametrize(
    "use", ["pairs", "completions", "prompts", "unpaired", "ranked", "scored", "implicit", "turns"]
)
def test_from_and_value_in_every_format(use, chat_tokenizer):
    """Pairs of such messages were "malformed". What is handed on (to rewards, say) has the usual keys."""

    def tokenized(person, answer, role, content):
        said_by = ((person, "hi"), (answer, "yes"), (answer, "no"))
        asked, said, other = ({role: by, content: text} for by, text in said_by)
        pair = {"prompt": [asked], "chosen": [said], "rejected": [other]}
        labelled = {"prompt": [asked], "completion": [said], "label": True}
        several = {"prompt": [asked], "completions": [[other], [said]], "scores": [0.0, 1.0]}
        row, function = {
            "unpaired": (labelled, align.data.tokenize_unpaired),
            "ranked": (several, align.data.tokenize_ranked),
            "scored": (several, tokenize_pairs),
            "implicit": ({"chosen": [asked, said], "rejected": [asked, other]}, tokenize_pairs),
            "turns": (pair, tokenize_turns),
        }.get(use) or (pair, getattr(align.data, f"tokenize_{use}"))
        limits = {"max_prompt_length": None} if use == "prompts" else {"max_length": None}
        (made,) = function(Dataset.from_list([row]), chat_tokenizer, **limits)
        return made

    one = tokenized("human", "gpt", "from", "value")
    other = tokenized("user", "assistant", "role", "content")
    assert [name for name in other if name.endswith(("ids", "mask", "lengths")) and one[name] != other[name]] == []
    handed_on = {"prompts": ("prompt",), "ranked": ("prompt",), "unpaired": (), "completions": ()}
    names = handed_on.get(use, ("prompt", "chosen", "rejected"))
    assert [one[name] for name in names] == [other[name] for name in names]


def test_turns_that_a_template_renders_otherwise_once_others_follow(make_tokenizer):
    tokenizer = make_tokenizer(
        eos="<|im_end|>", template=template("qwen3")
    )  # which drops the thoughts of earlier turns
    rows = Dataset.from_list([{"prompt": [ASKED], "completion": [ANSWER, ASKED, ANSWER]}])
    with pytest.raises(DataError, match="does not render the prompt as the beginning"):
        tokenize_completions(rows, tokenizer, max_length=None)
    (row,) = tokenize_completions(rows, training_tokenizer(tokenizer), max_length=None)
    trained = [t for t, m in zip(row["input_ids"], row["completion_mask"], strict=True) if m]
    assert tokenizer.decode(trained) == "<think>\n\n</think>\n\nSunny in Rome.<|im_end|>" * 2
    assert tokenizer.chat_template == template("qwen3")  # which is saved with the model


def test_dpo_trains_what_the_policy_wrote_in_an_answer(tool_tokenizer):
    row = {"prompt": [ASKED], "chosen": [CALL, RESULT, ANSWER], "rejected": [ANSWER], "tools": TOOLS}
    whole, options = Dataset.from_list([row]), {"max_length": None, "max_bad_share": 0.0}
    (found,) = numbered_pairs(whole, tool_tokenizer, turns=True, **options)
    (scored,) = numbered_pairs(whole, tool_tokenizer, scored=True, **options)
    assert {name: found[name] for name in IDS} == {name: scored[name] for name in IDS}
    trained = {n: list(compress(found[f"{n}_ids"], found[f"{n}_mask"])) for n in ("chosen", "rejected")}
    assert tool_tokenizer.decode(trained["chosen"]).endswith("</tool_call><|im_end|>Sunny in Rome.<|im_end|>")
    assert (
        "sun, 25 degrees" in tool_tokenizer.decode(found["chosen_ids"]) and trained["rejected"] == found["rejected_ids"]
    )
    with pytest.raises(DataError, match="chosen has a message of the role tool, which would be trained"):
        numbered_pairs(whole, tool_tokenizer, **options)
