"""Sets in the forms in which they are published: what would be trained without a part of them, and `align data convert`
for those whose columns have other names, a verdict, or answers in text beside messages."""

import json
import logging
import re

import pytest
from datasets import Dataset

from align.cli.main import main
from align.data import load_rows, tokenize_completions, tokenize_pairs, tokenize_prompts
from align.data.formats import format_for
from align.errors import ConfigError, DataError
from tests.data.test_data_docs import DOCS


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture
def convert(tmp_path):
    """convert(rows, *options): the rows that `align data convert` writes of these."""

    def run(rows, *options):
        source, target = tmp_path / "rows.jsonl", tmp_path / "converted.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        target.unlink(missing_ok=True)
        main(["data", "convert", str(source), "--to", str(target), *options])
        return [json.loads(line) for line in target.read_text().splitlines()]

    return run


def choices(rows):
    return [(row["chosen"][-1]["content"], row["rejected"][-1]["content"]) for row in rows]


PKU = {"prompt": "P", "response_0": "zero", "response_1": "one"}
BETTER = ["--plain", "--answers", "response_0", "response_1", "--better"]


def test_a_verdict_chooses(convert, capsys):
    """PKU-SafeRLHF, SHP (1 is the first), HelpSteer3 (-3 to 3), Chatbot Arena."""
    rows = [{**PKU, "safer_response_id": value, "strength": s} for value, s in ((0, -2), (1, 3), (0, 0))]
    right, wrong = ("zero", "one"), ("one", "zero")
    assert choices(convert(rows, *BETTER, "safer_response_id", "0", "1")) == [right, wrong, right]
    assert choices(convert(rows, *BETTER, "safer_response_id", "1", "0")) == [wrong, right, wrong]
    assert choices(convert(rows, *BETTER, "strength", "<0", ">0")) == [right, wrong]
    assert "1 of 3 rows have no better answer and are left out" in capsys.readouterr().out
    talks = [
        {"conversation_a": [user("q"), assistant("a")], "conversation_b": [user("q"), assistant("b")], "winner": winner}
        for winner in ("model_b", "tie (bothbad)", "model_a", None)
    ]
    options = ["--answers", "conversation_a", "conversation_b", "--better", "winner", "model_a", "model_b"]
    found = convert(talks, *options)
    assert choices(found) == [("b", "a"), ("a", "b")]
    assert found[0]["chosen"][0] == user("q") and "conversation_a" not in found[0] and found[0]["winner"] == "model_b"


def test_scores_choose(convert):
    """webgpt_comparisons; the question is an entry of a column."""
    rows = [
        {"question": {"full_text": "Why?"}, "a0": "x", "a1": "y", "s0": s0, "s1": s1} for s0, s1 in ((-1, 1), (0, 0))
    ]
    options = ["--plain", "--rename", "question.full_text=prompt", "--answers", "a0", "a1", "--scores", "s0", "s1"]
    (row,) = convert([*rows, {**rows[0], "s0": None}], *options)
    assert row["prompt"] == [user("Why?")] and choices([row]) == [("y", "x")]


def test_a_verdict_that_is_never_there_is_an_error(tmp_path):
    from align.data.arrange import chosen

    rows = Dataset.from_list([{**PKU, "winner": name} for name in ("model_a", "model_b")])
    with pytest.raises(ConfigError, match="no row has 'modela' in 'winner', which holds model_a, model_b"):
        chosen(rows, ["response_0", "response_1"], ["winner", "modela", "model_b"])
    with pytest.raises(ConfigError, match="there is no column 'x'"):
        chosen(rows, ["response_0", "response_1"], ["x", "0", "1"])


def test_system_messages_of_a_column(convert):
    """orca_dpo_pairs, ToolACE."""
    pair = {"question": "q", "chosen": "a", "rejected": "b"}
    rows = [{"system": text, **pair} for text in ("Be brief.", "", None)]
    found = convert(rows, "--plain", "--rename", "question=prompt", "--system_column", "system")
    assert [row["prompt"] for row in found] == [[SYSTEM, user("q")], [user("q")], [user("q")]]
    assert "system" not in found[0]
    (row,) = convert([{"system": "Be brief.", "messages": [user("q"), assistant("a")]}], "--system_column", "system")
    assert row == {"messages": [SYSTEM, user("q"), assistant("a")]}
    both = [{"system": "Other.", "messages": [SYSTEM, user("q"), assistant("a")]}]
    assert convert(both, "--system_column", "system")[0]["messages"][0] == SYSTEM


def test_messages_under_another_name_and_answers_in_text(convert):
    """RLVR's messages, Nemotron's input and output, RewardBench's prompts in text."""
    (row,) = convert([{"messages": [user("q")], "ground_truth": "4"}], "--rename", "messages=prompt")
    assert row == {"prompt": [user("q")], "ground_truth": "4"}
    (row,) = convert([{"input": [user("q")], "output": "a"}], "--rename", "input=prompt", "output=completion")
    assert row == {"prompt": [user("q")], "completion": [assistant("a")]}
    (row,) = convert([{"prompt": "q", "chosen": [assistant("a")], "rejected": [assistant("b")]}])
    assert row["prompt"] == [user("q")]
    single = {"chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}}  # LLaMA-Factory's
    (row,) = convert(
        [{"conversations": [{"from": "human", "value": "q"}], **single}], "--rename", "conversations=prompt"
    )
    assert row == {
        "prompt": [{"from": "human", "value": "q"}],
        "chosen": [assistant("a")],
        "rejected": [assistant("b")],
    }
    whole = {"prompt": "q", "chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]}
    (row,) = convert([whole], "--system", "Be brief.")
    assert row["prompt"] == "q" and row["rejected"] == [SYSTEM, user("q"), assistant("b")]


def test_a_prompt_in_text_beside_a_conversation_of_another_column(convert):
    """OpenR1-Math-220k and no_robots: the conversation is not what the prompts are read from."""
    talk = [user("q"), assistant("a")]
    (row,) = convert([{"problem": "q", "messages": talk}], "--plain", "--rename", "problem=prompt")
    assert row == {"prompt": [user("q")], "messages": talk}
    (row,) = convert([{"prompt": "q", "messages": talk}], "--plain", "--system", "Be brief.")
    assert row == {"prompt": [SYSTEM, user("q")], "messages": [SYSTEM, *talk]}


def test_an_input_beside_an_instruction(convert):
    """Alpaca."""
    rows = [{"instruction": "Sum up.", "input": text, "output": "a"} for text in ("A text.", "")]
    found = convert(rows, "--plain", "--rename", "instruction+input=prompt", "output=completion")
    assert [row["prompt"] for row in found] == [[user("Sum up.\n\nA text.")], [user("Sum up.")]]


# ---- what was read without a word ------------------------------------------------------------------------------------


def test_a_system_message_that_is_left_out_is_said(chat_tokenizer, caplog):
    rows = [{"system": "Be brief.", "prompt": [user("q")], "completion": [assistant("a")]}]
    with caplog.at_level(logging.WARNING):
        tokenize_completions(Dataset.from_list(rows), chat_tokenizer, max_length=None, source="rows.jsonl")
    assert "the column 'system' ('Be brief.') is not a part of what is trained" in caplog.text
    assert "align data convert rows.jsonl --to FILE.jsonl --system_column system" in caplog.text
    caplog.clear()
    rows[0]["prompt"] = [SYSTEM, user("q")]
    tokenize_completions(Dataset.from_list(rows), chat_tokenizer, max_length=None)
    assert "is not a part" not in caplog.text


def test_an_input_that_is_left_out_is_said(tokenizer, caplog):
    rows = [{"prompt": "Sum up.", "input": "A text.", "completion": "a"}]
    tokenize_completions(Dataset.from_list(rows), tokenizer, max_length=None)
    assert "the column 'input' ('A text.') is not a part of what is trained" in caplog.text


def test_messages_of_a_tree_are_no_texts(tokenizer):
    """OpenAssistant: each message was trained as a text of its own, questions too."""
    row = {"message_id": "1", "parent_id": None, "role": "prompter", "text": "Why?"}
    with pytest.raises(DataError, match="each row is one message of a conversation"):
        tokenize_completions(Dataset.from_list([row]), tokenizer, max_length=None)


def test_prompts_that_are_turns_as_json(tokenizer):
    """arena-human-preference-55k: the rollouts began after `["What is it?"]`."""
    rows = Dataset.from_list([{"prompt": '["What is it?"]', "response_a": '["this"]'}] * 2)
    with pytest.raises(DataError, match="the prompts are lists of turns as JSON"):
        tokenize_prompts(rows, tokenizer, max_prompt_length=None)
    one = Dataset.from_list([{"prompt": '["a", "b"] is a list of'}])
    assert len(tokenize_prompts(one, tokenizer, max_prompt_length=None)) == 1


def test_prompts_of_pairs_without_answers(chat_tokenizer):
    """The split train_gen of ultrafeedback_binarized: its answers are empty, and were looked at."""
    asked, other = [user("q")], [user("q"), assistant("x"), user("r")]
    rows = [
        {"prompt": "q", "chosen": [*talk, assistant(a)], "rejected": [*talk, assistant(b)]}
        for talk, a, b in ((asked, "", ""), (other, "yes", "yes"), (asked, "yes", "no"))
    ]
    found = tokenize_prompts(Dataset.from_list(rows), chat_tokenizer, max_prompt_length=None)
    assert found["prompt"][:] == [asked, other, asked]


def test_prompts_in_text_beside_messages_are_said(chat_tokenizer, caplog):
    rows = [{"prompt": "q", "messages": [SYSTEM, user("q"), assistant("a")]}]
    tokenize_prompts(Dataset.from_list(rows), chat_tokenizer, max_prompt_length=None)
    assert "the prompts are the column 'prompt', which is text and goes through no chat template" in caplog.text


def test_undesirable_answers_are_counted_in_demonstrations(tokenizer, caplog):
    rows = [{"prompt": "p", "completion": "a", "label": label} for label in (True, False)]
    assert len(tokenize_completions(Dataset.from_list(rows), tokenizer, max_length=None)) == 2
    assert "label false (undesirable, as KTO reads it) is trained as a demonstration: 1 (row 1)" in caplog.text


def test_a_call_in_a_role_of_its_own_is_a_bad_row(chat_tokenizer):
    """Toucan and ms-swift: the call was context, and only the answer after it was trained."""
    row = {"messages": [user("q"), {"role": "tool_call", "content": "{}"}, assistant("a")]}
    with pytest.raises(DataError, match="a message of the role tool_call, which would not be trained"):
        tokenize_completions(Dataset.from_list([row]), chat_tokenizer, max_length=None)


def test_a_question_under_another_name_is_not_left_out(tokenizer):
    """orca_dpo_pairs: what both answers begin with was their prompt."""
    row = {"question": "Why is it?", "chosen": "The sun shines.", "rejected": "The moon shines."}
    with pytest.raises(DataError, match="a column 'question' that is not in them: rename it, with `align data convert"):
        tokenize_pairs(Dataset.from_list([row]), tokenizer, max_length=None)
    whole = {"question": "Why?", "chosen": "Why? The sun.", "rejected": "Why? The moon."}
    assert len(tokenize_pairs(Dataset.from_list([whole]), tokenizer, max_length=None)) == 1


@pytest.mark.parametrize(
    "row, use, hint",
    [
        ({"question": "q", "answer": "a"}, "prompts", "Rename what is meant: 'question' -> 'prompt'."),
        ({"messages": [user("q")], "ground_truth": "4"}, "prompts", "Rename what is meant: 'messages' -> 'prompt'."),
        ({**PKU, "better_response_id": 0}, "pairs", "--answers response_0 response_1 --better COLUMN FIRST SECOND"),
        ({"context": "c", "response1": "a", "response2": "b"}, "pairs", "--answers response1 response2 --better"),
    ],
)
def test_hints_say_what_the_use_needs(row, use, hint):
    with pytest.raises(DataError) as error:
        format_for(Dataset.from_list([row]), use, "rows.jsonl")
    assert hint in str(error.value)


RECIPES: dict = {}
exec(re.findall(r"```python\n(import itertools.*?)```", DOCS, re.DOTALL)[0], RECIPES)  # as a reader would paste it
TREE = [
    {"message_id": "1", "parent_id": None, "role": "prompter", "text": "q", "rank": None},
    {"message_id": "2", "parent_id": "1", "role": "assistant", "text": "worse", "rank": 1},
    {"message_id": "3", "parent_id": "1", "role": "assistant", "text": "better", "rank": 0},
    {"message_id": "4", "parent_id": "3", "role": "prompter", "text": "more", "rank": 0},
]
UF = [{"response": text, "overall_score": score} for text, score in (("bad", 2.0), ("good", 8.5), ("?", None))]


@pytest.mark.parametrize(
    "name, row, expected",
    [
        ("ultrafeedback", {"instruction": "q", "completions": UF}, ("good", "bad")),
        (
            "nectar",
            {"prompt": "q", "answers": [{"answer": a, "rank": r} for a, r in (("b", 2.0), ("a", 1.0))]},
            ("a", "b"),
        ),
        ("summaries", {"info": {"post": "q"}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 1}, ("b", "a")),
    ],
)
def test_the_recipes_of_the_documentation(name, row, expected, tokenizer):
    rows = Dataset.from_list([row])
    pairs = tokenize_pairs(rows.map(RECIPES[name]), tokenizer, max_length=None)
    found = tuple(tokenizer.decode(pairs[0][f"{side}_ids"][:-1]) for side in ("chosen", "rejected"))
    assert found == expected


def test_the_recipes_that_put_rows_together(chat_tokenizer):
    helpsteer = [{"prompt": "p", "response": text, "helpfulness": score} for text, score in (("a", 1), ("b", 4))]
    (row,) = RECIPES["helpsteer"](helpsteer)
    assert row == {"prompt": "p", "completions": ["a", "b"], "scores": [1, 4]}
    (row,) = RECIPES["conversations"](TREE)
    assert row == {"messages": [user("q"), assistant("better"), user("more")]}
    row = {"prompt": '["q"]', "response_a": '["one"]', "response_b": '["two"]'}
    assert RECIPES["arena"](row) == {"a": [user("q"), assistant("one")], "b": [user("q"), assistant("two")]}
    bench = {"prompt": "q", "chosen": ["good"], "rejected": ["bad", "worse"], "subset": "Math"}
    with pytest.raises(DataError, match="chosen is a list of texts: each row has one"):
        tokenize_pairs(Dataset.from_list([bench]), chat_tokenizer, max_length=None)


def test_converted_rows_are_read(convert, chat_tokenizer, tmp_path):
    convert([{**PKU, "better_response_id": i} for i in (0, 1)], *BETTER, "better_response_id", "0", "1")
    pairs = tokenize_pairs(load_rows(tmp_path / "converted.jsonl"), chat_tokenizer, max_length=None)
    assert [chat_tokenizer.decode(ids) for ids in pairs["chosen_ids"]] == ["zero<|im_end|>", "one<|im_end|>"]
