"""Conversations: what a chat template adds, whose turns are trained, and rows that cannot be meant."""

import json
from itertools import compress

import pytest
from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from align.data import tokenize_completions, tokenize_pairs, tokenize_prompts
from align.errors import DataError
from tests.data.conftest import CHATML, CHATML_MARKED
from tests.data.test_tokenize import notes_of, pair_ids

USER, YES, NO = (
    [{"role": role, "content": text}] for role, text in (("user", "hi"), ("assistant", "yes"), ("assistant", "no"))
)
PROMPT_TEXT = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_conversational_pairs(chat_tokenizer):
    for row in ({"prompt": USER, "chosen": YES, "rejected": NO}, {"chosen": USER + YES, "rejected": USER + NO}):
        (done,) = tokenize_pairs(Dataset.from_list([row]), chat_tokenizer, max_length=99)
        assert chat_tokenizer.decode(done["prompt_ids"]) == PROMPT_TEXT
        # The template writes a line break after <|im_end|>; a rollout stops before it.
        assert chat_tokenizer.decode(done["chosen_ids"]) == "yes<|im_end|>"
        (prompt,) = tokenize_prompts(Dataset.from_list([row]), chat_tokenizer, max_prompt_length=99)
        assert prompt["prompt_ids"] == done["prompt_ids"] and prompt["prompt"] == USER


def test_a_template_that_brings_bos_gets_no_second_one(make_tokenizer, chat_tokenizer):
    tokenizer = make_tokenizer(bos=True, eos="<|im_end|>", template="<bos>" + chat_tokenizer.chat_template)
    (row,) = tokenize_pairs(
        Dataset.from_list([{"prompt": USER, "chosen": YES, "rejected": NO}]), tokenizer, max_length=99
    )
    assert tokenizer.decode(row["prompt_ids"]) == "<bos>" + PROMPT_TEXT
    twice = make_tokenizer(bos=True, eos="<|im_end|>", template="<bos><bos>" + chat_tokenizer.chat_template)
    with pytest.raises(DataError, match="prompt starts with BOS twice"):
        tokenize_prompts(Dataset.from_list([{"prompt": USER}]), twice, max_prompt_length=99)


def test_an_answer_ends_where_its_template_ends_it(make_tokenizer, chat_tokenizer):
    """Gemma, Phi-3, ChatML on a base tokenizer: the end of turn is not the tokenizer's EOS."""
    tokenizer = make_tokenizer(eos="<eos>", template=chat_tokenizer.chat_template)
    row = {"prompt": USER, "completion": YES}
    (done,) = tokenize_completions(Dataset.from_list([row]), tokenizer, max_length=99)
    assert tokenizer.decode(done["input_ids"]) == PROMPT_TEXT + "yes<|im_end|>"
    assert notes_of(tokenize_completions, row, tokenizer, max_length=99) == []
    (whole,) = tokenize_completions(Dataset.from_list([{"messages": USER + YES}]), tokenizer, max_length=99)
    assert (whole["input_ids"], whole["completion_mask"]) == (done["input_ids"], done["completion_mask"])
    (pair,) = tokenize_pairs(
        Dataset.from_list([{"prompt": USER, "chosen": YES, "rejected": NO}]), tokenizer, max_length=99
    )
    assert [tokenizer.decode(pair[name]) for name in ("chosen_ids", "rejected_ids")] == [
        "yes<|im_end|>",
        "no<|im_end|>",
    ]
    # plain text ends with EOS, but for text that somebody rendered
    for text, end in ((" yes", "<eos>"), (" yes<|im_end|>", ""), (" yes<|im_end|>\n", "")):
        assert tokenizer.decode(pair_ids(tokenizer, chosen=text)["chosen_ids"]) == text.strip("\n") + end


def test_a_template_that_writes_eos_after_the_last_turn_only(make_tokenizer, chat_tokenizer):
    """Phi-3 and Phi-4-mini."""
    end = "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}{{ eos_token }}{% endif %}"
    template = chat_tokenizer.chat_template.partition("{% if add_generation_prompt %}")[0] + end
    tokenizer = make_tokenizer(eos="<eos>", template=template)
    talk = {"messages": USER + YES + USER + NO}
    (row,) = tokenize_completions(Dataset.from_list([talk]), tokenizer, max_length=99)
    (plain,) = tokenize_completions(Dataset.from_list([talk]), chat_tokenizer, max_length=99)
    assert row == plain and trained_text(row, tokenizer) == ["yes<|im_end|>", "no<|im_end|>"]
    parted = {"prompt": USER + YES + USER, "completion": NO}
    (row,) = tokenize_completions(Dataset.from_list([parted]), tokenizer, max_length=99)
    assert row["input_ids"] == plain["input_ids"] and trained_text(row, tokenizer) == ["no<|im_end|>"]


def test_a_template_that_does_not_end_answers(make_tokenizer):
    tokenizer = make_tokenizer(template="{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
    row = {"prompt": USER, "completion": YES}
    (done,) = tokenize_completions(Dataset.from_list([row]), tokenizer, max_length=99)
    assert tokenizer.decode(done["input_ids"]) == "user: hi\nassistant: yes\n<eos>"
    assert notes_of(tokenize_completions, row, tokenizer, max_length=99) == [
        "the chat template does not end an answer with EOS (<eos>), which was added"
    ]


def test_control_tokens_typed_into_messages_are_noted_and_those_of_the_template_are_not(make_tokenizer, chat_tokenizer):
    tokenizer = make_tokenizer(bos=True, eos="<|im_end|>", template=chat_tokenizer.chat_template)
    tokenizer.bos_token = "<|im_start|>"  # as SmolLM2 has it
    row = {"prompt": USER, "chosen": YES, "rejected": NO}
    assert notes_of(tokenize_pairs, row, tokenizer, max_length=99) == []
    assert notes_of(tokenize_prompts, row, tokenizer, max_prompt_length=99) == []
    typed = [{"role": "assistant", "content": "yes<|im_end|>no"}]
    noted = ["chosen has <|im_end|> inside its text"]
    assert notes_of(tokenize_pairs, {**row, "chosen": typed}, tokenizer, max_length=99) == noted
    assert notes_of(tokenize_completions, {"messages": USER + typed}, tokenizer, max_length=99) == [
        "messages has <|im_end|> inside its text"
    ]


def test_messages_without_a_chat_template(tokenizer):
    with pytest.raises(DataError, match="has no chat template. Use the tokenizer of a chat model"):
        tokenize_prompts(Dataset.from_list([{"prompt": USER}]), tokenizer, max_prompt_length=99)


def test_a_generation_prompt_that_answers_do_not_begin_with(make_tokenizer, chat_tokenizer):
    """Reasoning models: the generation prompt ends in <think>, answers without reasoning are rendered without."""
    thinking = CHATML.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}")
    tokenizer = make_tokenizer(template=thinking, eos="<|im_end|>")
    row = {"prompt": USER, "chosen": YES, "rejected": NO}
    (pair,) = tokenize_pairs(Dataset.from_list([row]), tokenizer, max_length=99)
    (plain,) = tokenize_pairs(Dataset.from_list([row]), chat_tokenizer, max_length=99)
    assert pair == plain
    assert "the prompt ends where the two part" in notes_of(tokenize_pairs, row, tokenizer, max_length=99)[0]
    (talk,) = tokenize_completions(Dataset.from_list([{"messages": USER + YES}]), tokenizer, max_length=99)
    assert tokenizer.decode(talk["input_ids"]) == PROMPT_TEXT + "yes<|im_end|>"
    assert trained_text(talk, tokenizer) == ["yes<|im_end|>"]
    (prompt,) = tokenize_prompts(Dataset.from_list([row]), tokenizer, max_prompt_length=99)
    assert tokenizer.decode(prompt["prompt_ids"]) == PROMPT_TEXT + "<think>\n"


def test_a_template_that_renders_a_prompt_otherwise_before_an_answer(make_tokenizer):
    template = "{% for m in messages %}[{{ messages | length }}{{ m['content'] }}]{% endfor %}"
    tokenizer = make_tokenizer(template=template)
    with pytest.raises(DataError, match="does not render the prompt as the beginning of prompt"):
        tokenize_pairs(Dataset.from_list([{"prompt": USER, "chosen": YES, "rejected": NO}]), tokenizer, max_length=99)
    with pytest.raises(DataError, match="does not render the prompt as the beginning of prompt"):
        tokenize_completions(Dataset.from_list([{"messages": USER + YES}]), tokenizer, max_length=99)


def test_a_template_that_refuses_a_row(make_tokenizer):
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}x"
    rows = Dataset.from_list([{"prompt": [{"role": "system", "content": "s"}, *USER]}])
    with pytest.raises(DataError, match=r"the messages \(no system role\); .* first user message: 1 \(row 0\)"):
        tokenize_prompts(rows, make_tokenizer(template=template), max_prompt_length=99)


def test_template_arguments_of_a_row(make_tokenizer):
    tokenizer = make_tokenizer(template="{{ messages[0]['content'] }}{% if thinking %}!{% endif %}")
    rows = [{"prompt": USER, "chat_template_kwargs": {"thinking": flag}} for flag in (True, False)]
    done = tokenize_prompts(Dataset.from_list(rows), tokenizer, max_prompt_length=9)
    assert [tokenizer.decode(ids) for ids in done["prompt_ids"]] == ["hi!", "hi"]


def test_nobody_else_is_trained_as_the_assistant(chat_tokenizer):
    two = YES + [{"role": "user", "content": "sky?"}] + NO
    (row,) = tokenize_completions(
        Dataset.from_list([{"prompt": USER, "completion": two}]), chat_tokenizer, max_length=99
    )
    assert trained_text(row, chat_tokenizer) == ["yes<|im_end|>", "no<|im_end|>"]
    # what the template writes between two answers is not the policy's either
    (row,) = tokenize_completions(
        Dataset.from_list([{"prompt": USER, "completion": YES + NO}]), chat_tokenizer, max_length=99
    )
    assert trained_text(row, chat_tokenizer) == ["yes<|im_end|>", "no<|im_end|>"]
    # an earlier answer of the prompt is context
    rows = Dataset.from_list([{"prompt": USER + YES + USER, "completion": two}])
    (row,) = tokenize_completions(rows, chat_tokenizer, max_length=99)
    assert trained_text(row, chat_tokenizer) == ["yes<|im_end|>", "no<|im_end|>"]
    with pytest.raises(DataError, match="chosen has a message of the role user, which would be trained"):
        tokenize_pairs(
            Dataset.from_list([{"prompt": USER, "chosen": two, "rejected": NO}]), chat_tokenizer, max_length=99
        )
    # without masks what the template writes between two answers would be trained
    twice = Dataset.from_list([{"prompt": USER, "chosen": YES + NO, "rejected": NO}])
    with pytest.raises(DataError, match="chosen has 2 messages of the assistant, .* would be trained"):
        tokenize_pairs(twice, chat_tokenizer, max_length=99)
    tokenize_pairs(twice, chat_tokenizer, max_length=99, scored=True)


@pytest.mark.parametrize("template", [CHATML, CHATML_MARKED], ids=["rendered", "markers"])
def test_an_answer_of_weight_0_is_context(template, make_tokenizer):
    tokenizer = make_tokenizer(eos="<|im_end|>", template=template)

    def trained(weights, column="messages"):
        answers = [{**turn, "weight": weight} for turn, weight in zip(YES + NO, weights, strict=True)]
        talk = [*USER, answers[0], *USER, answers[1]]
        row = {"messages": talk} if column == "messages" else {"prompt": talk[:1], "completion": talk[1:]}
        (row,) = tokenize_completions(Dataset.from_list([row]), tokenizer, max_length=99)
        return trained_text(row, tokenizer)

    for column in ("messages", "completion"):
        assert trained([0, 1], column) == ["no<|im_end|>"]
        assert trained([1, 0], column) == trained([None, 0.0], column) == ["yes<|im_end|>"]
        with pytest.raises(DataError, match="all of the assistant's messages have weight 0"):
            trained([0, 0], column)
        with pytest.raises(DataError, match="a message of weight 0.5: it is trained"):
            trained([1, 0.5], column)
    rows = Dataset.from_list([{"prompt": USER, "completion": [{**YES[0], "weight": 0}]}])
    with pytest.raises(DataError, match="all of the assistant's messages have weight 0"):
        tokenize_completions(rows, tokenizer, max_length=99)


def test_answers_that_say_nothing_are_named(chat_tokenizer):
    rows = Dataset.from_list([{"messages": [*USER, {"role": "assistant", "content": " "}]}])
    with pytest.raises(DataError, match="messages has no assistant message that says anything"):
        tokenize_completions(rows, chat_tokenizer, max_length=99)


def test_answers_that_differ_in_their_calls_are_a_pair(make_tokenizer):
    template = CHATML.replace("message['content']", "message['content'] ~ (message.tool_calls or '')")
    tokenizer = make_tokenizer(eos="<|im_end|>", template=template)

    def call(city):
        function = {"name": "weather", "arguments": json.dumps({"city": city})}
        return [{"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}]

    def pair(rejected):
        rows = Dataset.from_list([{"prompt": USER, "chosen": call("Rome"), "rejected": call(rejected)}])
        return tokenize_pairs(rows, tokenizer, max_length=999)[0]

    row = pair("Oslo")
    assert row["chosen_ids"] != row["rejected_ids"]
    with pytest.raises(DataError, match="chosen equals rejected"):
        pair("Rome")


def test_a_text_with_bos_gets_no_second_one(make_tokenizer, tokenizer):
    texts = Dataset.from_list([{"text": "<bos>yes no"}, {"text": "yes no"}])
    marked, plain = tokenize_completions(texts, tokenizer, max_length=9)
    assert marked["input_ids"] == plain["input_ids"] and marked["completion_mask"] == plain["completion_mask"]
    with pytest.raises(DataError, match="text starts with BOS twice"):
        tokenize_completions(Dataset.from_list([{"text": "<bos><bos>yes no"}]), tokenizer, max_length=9)
    # SmolLM2's, whose BOS is a token of its template, and which puts none in front
    adds_none = make_tokenizer(bos=False)
    adds_none.bos_token = "<|im_start|>"
    with pytest.raises(DataError, match="text starts with BOS twice"):
        text = Dataset.from_list([{"text": "<|im_start|><|im_start|>user\nyes"}])
        tokenize_completions(text, adds_none, max_length=9)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": '[{"role": "user", "content": "hi"}]'}, "messages is text that should be messages"),
        ({"prompt": "hi", "completion": '[{"role": "assistant", "content": "yes"}]'}, "completion is text that should"),
        ({"prompt": str(USER), "completion": "yes"}, "prompt is text that should"),
        ({"text": json.dumps(json.dumps(USER + YES))}, "text is text that should"),
        ({"text": "\n".join(json.dumps(message) for message in USER + YES)}, "text is text that should"),
        ({"text": "\n".join(map(str, USER + YES))}, "text is text that should"),
        ({"text": json.dumps(USER + YES)[:-3]}, "text is text that should"),
        (
            {"text": "[{'role': 'user', 'content': \"it's\"}\n {'role': 'assistant', 'content': 'x'}]"},
            "text is text that",
        ),
        ({"text": '{"messages": [{"from": "human", "value": "hi"}]}'}, "text is text that should be messages"),
        ({"text": json.dumps({"tools": [], "dialog": USER + YES})}, "text is text that should be messages"),
        ({"text": "\ufeff" + json.dumps([USER + YES])}, "text is text that should be messages"),
        ({"prompt": "hi", "completion": str(tuple(YES))}, "completion is text that should"),
        ({"prompt": "hi", "completion": "{'role': 'assistant', 'content': 'x'}"}, "completion is text that should"),
        ({"messages": [USER]}, "messages has a malformed message"),
        ({"messages": USER + YES, "chat_template_kwargs": "thinking"}, "chat_template_kwargs is str instead of names"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "images are not supported"),
        ({"messages": USER + YES, "tools": ["search"]}, "tools is no list of functions"),
    ],
)
def test_rows_that_cannot_be_meant(chat_tokenizer, row, reason):
    with pytest.raises(DataError, match=reason):
        tokenize_completions(Dataset.from_list([row]), chat_tokenizer, max_length=99)


def test_answers_may_be_json(chat_tokenizer):
    answers = (
        '[{"name": "x"}]',
        '{"role": "admin"}',
        '[{"role": 1}, 2]',
        "{'from': 'x'}",
        "[] is empty",
        "[from: 'x']",
        '{"role": "user"}\n{"role": "admin"}',
        '"role": "user"',
    )
    rows = Dataset.from_list([{"prompt": "json?", "completion": answer} for answer in answers])
    assert len(tokenize_completions(rows, chat_tokenizer, max_length=99)) == len(answers)


def test_columns_that_trainers_take_for_tokens(tokenizer):
    for name in ("labels", "input_ids"):
        with pytest.raises(DataError, match=f"the column '{name}' would be taken for tokens"):
            tokenize_completions(Dataset.from_list([{"text": "yes", name: 1}]), tokenizer, max_length=9)


CONVERSATION = [{"messages": USER + YES + [{"role": "user", "content": "sky?"}] + NO + USER}]


def trained_text(row, tokenizer):
    runs = []
    for token, mask, before in zip(
        row["input_ids"], row["completion_mask"], [0, *row["completion_mask"]], strict=False
    ):
        if mask:
            runs += [[]] if not before else []
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]


def test_only_the_assistant_is_trained_with_and_without_generation_markers(chat_tokenizer, marked_tokenizer):
    rows = Dataset.from_list(CONVERSATION)
    (plain,) = tokenize_completions(rows, chat_tokenizer, max_length=99)
    (marked,) = tokenize_completions(rows, marked_tokenizer, max_length=99)
    assert plain == marked
    assert trained_text(plain, chat_tokenizer) == ["yes<|im_end|>", "no<|im_end|>"]
    # Nothing after the last answer is kept.
    assert chat_tokenizer.decode(plain["input_ids"]).endswith("sky?<|im_end|>\n<|im_start|>assistant\nno<|im_end|>")


def test_a_generation_block_that_leaves_eos_out_is_noted(make_tokenizer, marked_tokenizer):
    template = marked_tokenizer.chat_template.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
    tokenizer = make_tokenizer(eos="<|im_end|>", template=template)
    noted = notes_of(tokenize_completions, CONVERSATION[0], tokenizer, max_length=99)
    assert noted == ["the end token of the last answer is not trained: the template's generation block ends before it"]


MISTRAL = (  # of 7B-Instruct-v0.1: a space after </s>
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %}{{ m['content'] + eos_token + ' ' }}{% endif %}{% endfor %}"
)


def test_a_token_that_reaches_into_the_next_turn_is_not_trained():
    alphabet = ["<unk>", "▁", *map(chr, range(33, 127)), "▁["]
    raw = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, [("▁", "[")], unk_token="<unk>"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(split=False), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=MISTRAL
    )
    (row,) = tokenize_completions(Dataset.from_list([{"messages": USER + YES + USER + NO}]), tokenizer, max_length=99)
    assert "▁[" in tokenizer.convert_ids_to_tokens(row["input_ids"])
    assert tokenizer.decode(list(compress(row["input_ids"], row["completion_mask"]))) == "yes</s>no</s>"


def test_a_special_token_that_takes_the_space_of_an_answer_is_not_trained(make_tokenizer):
    template = CHATML.replace("<|im_start|>assistant\n", "<|assistant|>")
    template = template.replace("<|im_start|>{{ message['role'] }}\n", "<|{{ message['role'] }}|>")
    tokenizer = make_tokenizer(template=template, eos="<|im_end|>")
    tokenizer.add_special_tokens({"extra_special_tokens": [AddedToken("<|assistant|>", rstrip=True, normalized=False)]})
    talk = [*USER, {"role": "assistant", "content": " yes"}]
    (row,) = tokenize_completions(Dataset.from_list([{"messages": talk}]), tokenizer, max_length=99)
    assert tokenizer.decode(list(compress(row["input_ids"], row["completion_mask"]))) == "yes<|im_end|>"


def test_an_answers_last_token_that_takes_the_next_turns_line_break_is_trained():
    alphabet = ["<unk>", "▁", "\n", *map(chr, range(33, 127)), ".\n"]
    raw = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, [(".", "\n")], unk_token="<unk>"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(split=False), decoders.Metaspace()
    template = (
        "{{ bos_token }}{% for m in messages %}{{ '' if loop.first else '\n' }}{{ m['role'] }}:{{ m['content'] }}"
    )
    template += "{% endfor %}{% if add_generation_prompt %}{{ '\nassistant:' }}{% endif %}"
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, chat_template=template, **special)
    talk = [*USER, {"role": "assistant", "content": "yes."}, *USER, *YES]
    (row,) = tokenize_completions(Dataset.from_list([{"messages": talk}]), tokenizer, max_length=99)
    trained = list(compress(row["input_ids"], row["completion_mask"]))
    assert tokenizer.decode(trained[:4]) == "yes.\n"
