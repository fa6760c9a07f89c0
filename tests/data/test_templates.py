"""The chat templates that TRL ships: what is trained is what each renders, or the row is refused."""

import re
from functools import cache
from itertools import compress

import pytest
from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from align.data import describe_example, tokenize_completions, tokenize_pairs, tokenize_prompts
from align.data.ending import end_ids, ending_of, written_text
from align.data.revisions import revision_prompt
from align.errors import DataError, RolloutError
from align.reward_models.base import RewardBatch
from align.reward_models.sequences import SequenceEncoder
from align.rollout.types import SamplingParams
from align.trainers.on_policy.environments import Environments
from align.trainers.on_policy.episodes import Episodes
from align.trainers.on_policy.turn_tokens import TurnTokens
from tests.data.test_messages import ANSWER, ASKED, CALL, RESULT, TOOLS, template
from tests.trainers.on_policy.talks import GuessingGame, Scripted, rows, talking_tokenizer

ENDS = {
    "cohere": ("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"),
    "deepseek": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "diffusion": ("<bos>", "<eos>"), "gemma": ("<bos>", "<eos>"), "glm4moe": (None, "<|endoftext|>"),
    "gptoss": ("<|startoftext|>", "<|return|>"), "idefics3": ("<|begin_of_text|>", "<end_of_utterance>"),
    "lfm2": ("<|startoftext|>", "<|im_end|>"), "llama3": ("<|begin_of_text|>", "<|eot_id|>"),
    "llava": ("<s>", "</s>"), "muse": ("<|begin_of_text|>", "<|eot|>"), "nemotron": ("<s>", "<|im_end|>"),
    "phi3": ("<s>", "<|endoftext|>"), "qwen": (None, "<|im_end|>"), "smolvlm": ("<|im_start|>", "<end_of_utterance>"),
}  # fmt: skip
"""BOS and EOS of a family."""
SPECIAL = re.compile(r"<[|｜][^\s<>{}'\"]+?[|｜]?>|<(?:start_of_turn|end_of_turn|turn\||tool_call\|)>")
MORE = (
    "<|start|> <|end|> <|call|> <|user|> <|assistant|> <|observation|> <|eot_id|> <|eom|> <|eom_id|> <|python_tag|>"
).split()

NAMES = (
    "cohere cohere2 deepseek_r1_distill deepseekv3 diffusion_gemma gemma gemma3 gemma4 gemma4_v2 gemma4_v3 gemma4_v4 "
    "gemma4_v5 glm4moe gptoss idefics3 lfm2 lfm2_2_5 lfm2_2_5_v2 lfm2_2_5_vl lfm2_v2 llama3 llama3_1 llama3_2 "
    "llava_next muse_glimmer nemotron_3_5_lightning nemotron_3_nano nemotron_3_super nemotron_3_ultra phi3 phi3_5 "
    "qwen2_5 qwen2_5_vl qwen3 qwen3_5_nothink qwen3_5_think qwen3_6 qwen3_8 qwen3_instruct_2507 qwen3_vl smolvlm"
).split()
PARTS = {"idefics3", "llava_next", "smolvlm"}  # content is a list
UNMARKED = {"gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4", "gemma4_v5", "llama3_1", "llama3_2"}
DROPS = {"qwen3", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6"}  # renders earlier answers without <think></think>
HEADERS = {
    "cohere2": ["<|END_OF_TURN_TOKEN|>"],  # which follows the end, <|END_RESPONSE|>
    **dict.fromkeys(("deepseek_r1_distill", "deepseekv3"), ["<｜Assistant｜>"]),
    "gptoss": ["<|start|>assistant", "<|end|>"],  # <|end|> ends earlier answers alone, and no rollout
    "muse_glimmer": ["<|start|>assistant"],
    **dict.fromkeys((f"nemotron_3_{size}" for size in ("5_lightning", "nano", "super", "ultra")), ["<think>"]),
    **dict.fromkeys(("phi3", "phi3_5"), ["<|endoftext|>"]),  # after the last answer's <|end|>
    "qwen2_5": ["\n"],
    "qwen3_5_nothink": ["<think>\n\n</think>\n\n"],
    **dict.fromkeys(("qwen3_5_think", "qwen3_6", "qwen3_8"), ["<think>\n"]),
}
"""What a template for training marks as the assistant's beside the answer and its end: mostly a part of the header,
which a rollout gets in its prompt."""

ASKED_AGAIN = {"role": "user", "content": "At night?"}
NO = {"role": "assistant", "content": "No."}
MARKED = {"return_dict": True, "return_assistant_tokens_mask": True}


@cache
def family(name):
    """A tokenizer of bytes with the special tokens that a template writes."""
    text, own = template(name), template(name.removesuffix("_training"))
    bos, eos = next(ends for start, ends in ENDS.items() if name.startswith(start))
    raw = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = dict.fromkeys(filter(None, [bos, eos, *SPECIAL.findall(own), *MORE]))
    raw.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=bos, eos_token=eos, chat_template=text)


def rendered(name, messages, **options):
    if name.removesuffix("_training") in PARTS:
        messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    return family(name).apply_chat_template(messages, **options)


def only(tokenize, row, name, **options):
    (found,) = tokenize(Dataset.from_list([row]), family(name), **options)
    return found


def completion(row, name):
    found = only(tokenize_completions, row, name, max_length=None)
    return found, family(name).decode(list(compress(found["input_ids"], found["completion_mask"])))


@pytest.mark.parametrize("name", NAMES)
def test_prompt_and_answer_are_what_the_template_renders(name):
    row = {"prompt": [ASKED, ANSWER, ASKED_AGAIN], "chosen": [ANSWER], "rejected": [NO]}
    pair, tokenizer = only(tokenize_pairs, row, name, max_length=None), family(name)
    ending = ending_of(tokenizer, True)
    for side in ("chosen", "rejected"):
        ids = pair["prompt_ids"] + pair[f"{side}_ids"]
        added = [] if ending.written else [ids.pop()]  # GLM-4 ends an answer with the next header
        assert ids + list(ending.tail) == rendered(name, row["prompt"] + row[side], return_dict=False)
        ends = [token for token in pair[f"{side}_ids"] if token in end_ids(tokenizer)]
        assert ends == pair[f"{side}_ids"][-1:] and (ending.written or ends == added)
        assert row[side][0]["content"] in tokenizer.decode(pair[f"{side}_ids"])
    (prompt,) = [only(tokenize_prompts, row, name, max_prompt_length=None)["prompt_ids"]]
    assert prompt == rendered(name, row["prompt"], add_generation_prompt=True, return_dict=False)
    assert prompt[: len(pair["prompt_ids"])] == pair["prompt_ids"]
    assert prompt.count(tokenizer.bos_token_id) == tokenizer.decode(prompt).count(tokenizer.bos_token or "<no bos>")


@pytest.mark.parametrize("name", sorted({*NAMES} - UNMARKED))
@pytest.mark.parametrize("turns", [1, 2])
def test_what_the_template_for_training_marks_is_trained_up_to_the_end_token(name, turns):
    marks = name if name.startswith("lfm2_2") else f"{name}_training"
    talk = [ASKED, ANSWER, ASKED_AGAIN, NO][: 2 * turns]
    used = marks if name in DROPS and turns == 2 else name
    _, trained = completion({"messages": talk}, used)
    whole = rendered(marks, talk, **MARKED)
    tokenizer = family(name)
    marked = tokenizer.decode(list(compress(whole["input_ids"], whole["assistant_masks"])))
    end = tokenizer.convert_ids_to_tokens(ending_of(tokenizer, True).token)
    if name == "glm4moe":
        marked, trained = marked.replace("<|user|>", ""), trained.removesuffix(end)
    for header in HEADERS.get(used, []):
        marked = marked.replace(header, "")
    assert trained == re.sub(rf"({re.escape(end)})\n", r"\1", marked)


@pytest.mark.parametrize("name", ["lfm2_2_5", "gemma_training", "qwen3_training"])
def test_the_line_break_after_a_marked_answer_is_not_trained(name):
    _, trained = completion({"messages": [ASKED, ANSWER, ASKED_AGAIN, NO]}, name)
    assert not re.search(r"(end\|>|end_of_turn>)\n", trained)


THOUGHT = {"role": "assistant", "content": "<think>\nLet me see.\n</think>\n\nYes."}
ANY_KEY = hasattr(chat_template_utils, "_REASONING_FIELDS")
"""Whether this transformers gives a template the thoughts under the key that it reads, whatever their own."""
CHANNEL = {"role": "assistant", "content": "<|channel>thought\nLet me see.\n<channel|>Yes."}


def thinking(key):
    return {"role": "assistant", "content": "Yes.", key: "Let me see."}


@pytest.mark.parametrize(
    ("name", "answer", "kept"),
    [
        ("gemma", thinking("reasoning_content"), False),
        ("qwen3", thinking("reasoning_content"), True),
        ("qwen3", thinking("thinking"), ANY_KEY),
        ("qwen3", THOUGHT, True),
        ("gptoss", thinking("thinking"), True),
        ("gptoss", thinking("reasoning_content"), ANY_KEY),
        ("deepseek_r1_distill", THOUGHT, False),
        ("deepseek_r1_distill_training", THOUGHT, True),
        ("gemma4_v5", thinking("reasoning"), True),
        ("gemma4_v4", thinking("reasoning"), False),
        ("gemma4_v5", CHANNEL, False),
        ("diffusion_gemma", thinking("reasoning_content"), True),
        ("lfm2_2_5_vl", thinking("reasoning"), True),
        ("lfm2_2_5", THOUGHT, True),
    ],
)
def test_thoughts_are_trained_or_the_row_is_refused(name, answer, kept):
    rows = {"messages": [ASKED, answer]}, {"prompt": [ASKED], "completion": [answer]}
    pair = {"prompt": [ASKED], "chosen": [answer], "rejected": [NO]}
    for row in rows:
        if kept:
            assert "Let me see." in completion(row, name)[1]
        else:
            with pytest.raises(DataError, match="the chat template leaves out the .* of an answer, which would be"):
                completion(row, name)
    if kept:
        chosen = only(tokenize_pairs, pair, name, max_length=None)["chosen_ids"]
        assert "Let me see." in family(name).decode(chosen)
    else:
        with pytest.raises(DataError, match="the chat template leaves out the"):
            only(tokenize_pairs, pair, name, max_length=None)


def test_earlier_thoughts_may_be_left_out_of_a_prompt_and_not_of_a_trained_answer():
    row = {"prompt": [ASKED, THOUGHT, ASKED_AGAIN], "completion": [NO]}
    found, trained = completion(row, "lfm2_2_5")
    assert "Let me see" not in family("lfm2_2_5").decode(found["input_ids"]) and trained == "No.<|im_end|>"
    with pytest.raises(DataError, match="leaves out the thoughts of an answer"):
        completion({"messages": [ASKED, THOUGHT, ASKED_AGAIN, NO]}, "lfm2_2_5")


@pytest.mark.parametrize(
    ("name", "end"), [("gptoss", "<|call|>"), ("gemma4_v5", "<|tool_response>"), ("llama3_1", "<|eot_id|>")]
)
def test_a_call_ends_as_the_template_ends_it(name, end):
    tokenizer = family(name)
    number = tokenizer.convert_tokens_to_ids(end)
    assert number in end_ids(tokenizer)  # where rollouts stop
    row = {"prompt": [ASKED], "chosen": [CALL], "rejected": [ANSWER], "tools": TOOLS}
    pair = only(tokenize_pairs, row, name, max_length=None)
    whole = rendered(name, [ASKED, CALL], tools=TOOLS, return_dict=False)
    assert pair["prompt_ids"] + pair["chosen_ids"] == whole
    assert f"chosen ({len(pair['chosen_ids'])} tokens, ends with {end})" in describe_example(pair, tokenizer, "pairs")
    assert written_text(tokenizer, pair["chosen_ids"], True) == tokenizer.decode(pair["chosen_ids"][:-1])
    found, trained = completion({"messages": [ASKED, CALL, RESULT, ANSWER], "tools": TOOLS}, name)
    assert [token in end_ids(tokenizer) for token in tokenizer(trained)["input_ids"]].count(True) == 2
    assert end in trained and RESULT["content"] not in trained


@pytest.mark.parametrize("name", ["gptoss", "gemma4_v5", "qwen3"])
@pytest.mark.parametrize("whole_turn", [False, True])
def test_a_reward_model_reads_a_drawn_call_up_to_its_end(name, whole_turn):
    tokenizer = family(name)
    row = {"prompt": [ASKED], "chosen": [CALL], "rejected": [ANSWER], "tools": TOOLS}
    pair = only(tokenize_pairs, row, name, max_length=None)
    ids = [pair["chosen_ids"]], [pair["prompt_ids"]]
    batch = RewardBatch([[ASKED]], [[CALL]], completion_ids=ids[0], prompt_ids=ids[1], ended=[True])
    encoder = SequenceEncoder("rm", tokenizer, policy_tokenizer=tokenizer, whole_turn=whole_turn)
    tail = rendered(name, [ASKED, CALL], tools=TOOLS, return_dict=False)[len(ids[1][0] + ids[0][0]) :]
    assert encoder(batch) == [(ids[1][0], ids[0][0] + (tail if whole_turn else []))]


def test_a_drawn_answer_is_scored_without_the_thoughts_that_a_template_leaves_out():
    batch = RewardBatch([[ASKED]], [[THOUGHT]])
    ((_, scored),) = SequenceEncoder("rm", family("deepseek_r1_distill"))(batch)
    assert family("deepseek_r1_distill").decode(scored).strip() == "Yes.<｜end▁of▁sentence｜>"


def test_calls_that_a_template_leaves_out_or_cannot_render():
    talk = {"messages": [ASKED, CALL, RESULT, ANSWER]}
    with pytest.raises(DataError, match="the chat template renders no tool_calls"):
        completion(talk, "deepseek_r1_distill")
    with pytest.raises(DataError, match=r"the chat template refuses the messages \(TypeError"):  # wants JSON text
        completion(talk, "deepseekv3")


@pytest.mark.parametrize("name", ["gptoss", "gemma4", "gemma4_v5", "glm4moe_training", "qwen3_training", "llama3_2"])
def test_what_follows_a_call_in_a_rollout_is_what_the_template_renders(name):
    tokenizer, options = family(name), {"tools": TOOLS, "return_dict": False}
    drawn = rendered(name, [ASKED, CALL], **options)
    while drawn[-1] not in end_ids(tokenizer):
        drawn.pop()
    after = TurnTokens(tokenizer, ["tool"]).between([RESULT], drawn[-1], {"tools": TOOLS})
    assert drawn + after == rendered(name, [ASKED, CALL, RESULT], add_generation_prompt=True, **options)


@pytest.mark.parametrize(
    "name", ["cohere", "gemma3", "glm4moe_training", "llava_next", "muse_glimmer", "qwen3_training"]
)
def test_what_follows_an_answer_in_a_rollout_is_what_the_template_renders(name):
    tokenizer = family(name)
    drawn = rendered(name, [ASKED, NO], return_dict=False)
    while drawn[-1] not in end_ids(tokenizer):
        drawn.pop()
    after = TurnTokens(tokenizer, ["user"]).between([ASKED_AGAIN], drawn[-1], {})
    assert drawn + after == rendered(name, [ASKED, NO, ASKED_AGAIN], add_generation_prompt=True, return_dict=False)


MOVES = (  # as Mistral's up to version 3
    "{% for m in messages if m.role != 'system' %}<|im_start|> {{ m.role }} "
    "{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content }} {% endif %}"
    "{{ m.content }} <|im_end|> {% endfor %}{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


def test_a_system_message_that_would_move_in_a_rollout_is_refused():
    tokenizer = talking_tokenizer(MOVES)
    (row,), params = rows(tokenizer), [SamplingParams(max_tokens=40, seed=1)]
    episodes = Episodes(Environments(GuessingGame, [], 5), tokenizer)
    (found,) = episodes.complete(Scripted(tokenizer, "one", "two"), [row], params, [0])
    assert found.completions[0].episode.turns == 2
    row = {**row, "prompt": [{"role": "system", "content": "higher"}, *row["prompt"]]}
    with pytest.raises(RolloutError, match="row 0 has a system message, which this chat template moves"):
        episodes.complete(Scripted(tokenizer, "one", "two"), [row], params, [0])


def test_a_drawn_answer_with_channels_stands_in_a_conversation_that_goes_on():
    drawn = "<|channel|>analysis<|message|>Let me see.<|end|><|start|>assistant<|channel|>final<|message|>Yes."
    shown = revision_prompt([ASKED], drawn, "Better?")
    text = rendered("gptoss", shown, tokenize=False)
    assert "<|channel|>final<|message|>Yes.<|end|>" in text and "Let me see" not in text
    assert revision_prompt([ASKED], "Yes.")[1] == {"role": "assistant", "content": "Yes."}


def test_arguments_that_are_no_variables_of_a_template():
    row = {"messages": [ASKED, ANSWER], "chat_template_kwargs": {"add_generation_prompt": True}}
    with pytest.raises(DataError, match="chat_template_kwargs has add_generation_prompt, which is no variable"):
        completion(row, "qwen3")
