"""BOS, EOS, the prompt/completion boundary, length limits, and what survives tokenisation."""

import pytest
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from align.data import BadRows, tokenize_completions, tokenize_pairs, tokenize_prompts
from align.data.encode import ids_of, plain_backend
from align.data.ranked import tokenize_ranked
from align.data.unpaired import tokenize_unpaired
from align.errors import DataError

PAIR = {"prompt": "Human: hi\n\nAssistant:", "chosen": " yes", "rejected": " no"}


def pair_ids(tokenizer, max_length=200, **columns):
    (row,) = tokenize_pairs(Dataset.from_list([{**PAIR, **columns}]), tokenizer, max_length=max_length)
    return row


def prompt_ids(tokenizer, prompt):
    (row,) = tokenize_prompts(Dataset.from_list([{"prompt": prompt}]), tokenizer, max_prompt_length=None)
    return row["prompt_ids"]


def notes_of(tokenize, row, tokenizer, **options):
    report = BadRows()
    tokenize(Dataset.from_list([row]), tokenizer, report=report, **options)
    assert not report.reasons
    return list(report.notes)


# ---- BOS and EOS ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [True, False])
def test_bos_once_in_front_and_eos_once_at_the_end(make_tokenizer, bos):
    tokenizer = make_tokenizer(bos=bos)
    row = pair_ids(tokenizer)
    start = "<bos>" if bos else ""
    assert tokenizer.decode(row["prompt_ids"]) == start + PAIR["prompt"]
    assert tokenizer.decode(row["chosen_ids"]) == " yes<eos>"
    assert tokenizer.decode(row["rejected_ids"]) == " no<eos>"


def test_bos_in_the_text_is_not_doubled(tokenizer):
    assert prompt_ids(tokenizer, " \n<bos>hi") == prompt_ids(tokenizer, "<bos>hi")
    ids = prompt_ids(tokenizer, "<bos>hi")
    assert ids == prompt_ids(tokenizer, "hi")
    assert ids.count(tokenizer.bos_token_id) == 1


def test_eos_in_the_text_is_not_doubled(tokenizer):
    for chosen in (" yes<eos>", " yes<eos>\n", " yes<eos><eos>"):
        assert pair_ids(tokenizer, chosen=chosen)["chosen_ids"] == pair_ids(tokenizer)["chosen_ids"]


def test_a_tokenizer_that_ends_texts_with_eos_does_not_end_prompts(make_tokenizer):
    row = pair_ids(make_tokenizer(bos=True, adds_eos=True))
    assert row["prompt_ids"] == pair_ids(make_tokenizer(bos=True))["prompt_ids"]
    assert row["chosen_ids"] == pair_ids(make_tokenizer(bos=True))["chosen_ids"]


def test_special_tokens_inside_a_text_are_noted(tokenizer):
    noted = notes_of(tokenize_pairs, {**PAIR, "chosen": " yes<eos> no"}, tokenizer, max_length=99)
    assert noted == ["chosen has <eos> inside its text"]
    noted = notes_of(tokenize_prompts, {"prompt": "a<bos>b"}, tokenizer, max_prompt_length=99)
    assert noted == ["prompt has <bos> inside its text"]


def test_further_turns_in_an_answer_given_as_text_are_refused(make_tokenizer, chat_tokenizer):
    turns = "yes<|im_end|>\n<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\nno<|im_end|>\n"
    rendered = {"prompt": "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "chosen": turns, "rejected": "no"}
    dialogue = {
        "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
        "rejected": "\n\nHuman: a\n\nAssistant: e",
    }
    for pair, reason in ((rendered, "goes on with a further turn after"), (dialogue, "has a further turn of Human:")):
        rows = Dataset.from_list([pair])
        with pytest.raises(DataError, match=f"chosen {reason}.*which would be trained as the policy's"):
            tokenize_pairs(rows, chat_tokenizer, max_length=200)
        tokenize_pairs(rows, chat_tokenizer, max_length=200, scored=True)  # a reward model may read them
    for dataset, tokenize in (
        (Dataset.from_list([{"prompt": rendered["prompt"], "completion": turns}]), tokenize_completions),
        (Dataset.from_list([{"prompt": rendered["prompt"], "completion": turns, "label": True}]), tokenize_unpaired),
        (Dataset.from_list([{"prompt": "hi", "completions": [turns, "no"], "scores": [1.0, 0.0]}]), tokenize_ranked),
        (
            Dataset.from_list([{"prompt": "Human: a\n\nAssistant:", "completion": " b\n\nHuman: c"}]),
            tokenize_completions,
        ),
    ):
        with pytest.raises(DataError, match="further turn .*which would be trained as the policy's"):
            tokenize(dataset, chat_tokenizer, max_length=200)
    for asked, more in (
        ("User: a\nAssistant:", " b\nUser: c\nAssistant: d"),
        ("User: a\nAssistant:", " b\n\nUser: c"),
        ("Q: a\nA:", " b\nQ: c\nA: d"),
        ("### Instruction:\na\n\n### Response:\n", "b\n\n### Instruction:\nc\n\n### Response:\nd"),
    ):
        pair = {"prompt": asked, "chosen": more, "rejected": " x"}
        with pytest.raises(DataError, match="chosen has a further turn of (User|Q|Instruction):, which would be"):
            tokenize_pairs(Dataset.from_list([pair]), make_tokenizer(), max_length=200)
    for asked, own in (  # names that nobody has there
        ("Q: a\nA:", " b\nUser: c\nQ: d"),
        ("User: a\nAssistant:", " Dear Human: b\nBot: c"),
        ("Q: a\nA:", " b\nQ: c"),
        ("APA: a\nMLA:", " b\nAPA: c\nMLA: d"),
    ):
        pair = {"prompt": asked, "chosen": own, "rejected": " x"}
        tokenize_pairs(Dataset.from_list([pair]), make_tokenizer(), max_length=200)
    (whole,) = tokenize_completions(Dataset.from_list([{"text": turns}]), chat_tokenizer, max_length=200)
    assert all(whole["completion_mask"])  # every token of `text` is trained, by its definition


def test_eos_is_trained_when_it_is_also_the_pad_token(make_tokenizer):
    from align.data import CompletionCollator, PairCollator

    tokenizer = make_tokenizer(pad_is_eos=True)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    rows = [{"prompt": "hi", "completion": " yes"}, {"prompt": "hi", "completion": " yes yes yes"}]
    done = tokenize_completions(Dataset.from_list(rows), tokenizer, max_length=99)
    labels = CompletionCollator(tokenizer.pad_token_id)(list(done))["labels"]
    assert [(row == tokenizer.eos_token_id).sum().item() for row in labels] == [1, 1]
    batch = PairCollator(tokenizer.pad_token_id)([pair_ids(tokenizer, chosen=" yes yes")])
    trained = batch["input_ids"][batch["completion_mask"] == 1]
    assert (trained == tokenizer.eos_token_id).sum() == 2


def test_no_eos_token_is_an_error_only_where_completions_are_trained(make_tokenizer):
    tokenizer = make_tokenizer(eos=None)
    tokenize_prompts(Dataset.from_list([PAIR]), tokenizer, max_prompt_length=None)
    for tokenize in (tokenize_pairs, tokenize_completions):
        with pytest.raises(DataError, match="no EOS token"):
            tokenize(Dataset.from_list([PAIR]), tokenizer, max_length=None)


# ---- the boundary ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["bytes", "metaspace"])
@pytest.mark.parametrize("prompt, completion", [("Answer:", " yes"), ("Answer: ", "yes"), ("sk", "y"), ("a\n", "\nb")])
def test_training_and_rollouts_share_the_prompt_and_the_text_survives(make_tokenizer, style, prompt, completion):
    tokenizer = make_tokenizer(style=style)
    row = pair_ids(tokenizer, prompt=prompt, chosen=completion)
    assert row["prompt_ids"] == prompt_ids(tokenizer, prompt)
    assert tokenizer.decode(row["prompt_ids"] + row["chosen_ids"]).strip() == f"{prompt}{completion}<eos>"


def test_a_merge_over_the_boundary_is_noted(tokenizer):
    rows = {"prompt": "Answer: ", "completion": "yes"}, {"prompt": "Answer:", "completion": " yes"}
    noted = [notes_of(tokenize_completions, row, tokenizer, max_length=99) for row in rows]
    assert noted == [["prompt and completion would merge into one token, so the completion is tokenised apart"], []]


@pytest.mark.parametrize("known", [[], ["."], ["\n"]], ids=["no anchor", "full stop", "line break"])
def test_words_that_are_tokenised_apart_are_all_there(known):
    """A word tokenizer that makes one unknown word of an anchor and the first word after it."""
    words = WordLevel({word: i for i, word in enumerate(["<unk>", "<eos>", "red", "green", "blue", *known])}, "<unk>")
    raw = Tokenizer(words)
    raw.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", eos_token="<eos>")
    row = pair_ids(tokenizer, prompt="red", chosen="green blue", rejected="blue")
    assert (row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) == ([2], [3, 4, 1], [4, 1])


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("chosen_prob", 1.2, "chosen_prob is not a probability in [0, 1]"),
        ("chosen_prob", -0.1, "chosen_prob is not a probability in [0, 1]"),
        ("chosen_prob", None, "chosen_prob is missing"),
        ("chosen_prob", float("nan"), "chosen_prob is not a finite number"),
        ("margin", float("inf"), "margin is not a finite number"),
        ("margin", None, "margin is missing"),
    ],
)
def test_soft_labels_and_margins_must_be_numbers(tokenizer, column, value, reason):
    rows = Dataset.from_list([{**PAIR, column: good} for good in (0.0, value, 1.0)])
    report = BadRows()
    done = tokenize_pairs(rows, tokenizer, max_length=99, max_bad_share=0.5, report=report)
    assert done["row"][:] == [0, 2] and done[column][:] == [0.0, 1.0]
    assert report.reasons == {reason: [1]}


def test_a_margin_below_zero_is_noted(tokenizer):
    """A verdict from -3 to 3, say, whose sign has already chosen the better answer."""
    assert notes_of(tokenize_pairs, {**PAIR, "margin": -2.0}, tokenizer, max_length=99) == [
        "margin is below 0, which says that the rejected answer is the better one"
    ]
    assert not notes_of(tokenize_pairs, {**PAIR, "margin": 0.0}, tokenizer, max_length=99)


# ---- length limits --------------------------------------------------------------------------------------------------


def test_a_long_completion_is_cut_without_eos_and_noted(tokenizer):
    full = pair_ids(tokenizer, chosen=" yes yes yes")
    length = len(full["prompt_ids"])
    for room in (1, 2, 3):
        cut = pair_ids(tokenizer, chosen=" yes yes yes", max_length=length + room)
        assert cut["chosen_ids"] == full["chosen_ids"][:room]
        assert tokenizer.eos_token_id not in cut["chosen_ids"]
        assert cut["prompt_ids"] == full["prompt_ids"]
    assert pair_ids(tokenizer, chosen=" yes yes yes", max_length=length + 4)["chosen_ids"] == full["chosen_ids"]
    noted = notes_of(tokenize_pairs, {**PAIR, "chosen": " yes yes"}, tokenizer, max_length=length + 2)
    assert noted == [f"chosen is cut at max_length={length + 2}"]


def test_a_prompt_is_never_cut(tokenizer):
    length = len(prompt_ids(tokenizer, PAIR["prompt"]))
    rows = Dataset.from_list([PAIR])
    assert len(tokenize_prompts(rows, tokenizer, max_prompt_length=length)[0]["prompt_ids"]) == length
    with pytest.raises(DataError, match=f"longer than max_prompt_length={length - 1} tokens"):
        tokenize_prompts(rows, tokenizer, max_prompt_length=length - 1)


def test_a_long_demonstration_is_cut_at_the_end(tokenizer):
    row = {"prompt": "hi", "completion": " yes yes yes"}
    (whole,) = tokenize_completions(Dataset.from_list([row]), tokenizer, max_length=None)
    (cut,) = tokenize_completions(Dataset.from_list([row]), tokenizer, max_length=4)
    assert cut["input_ids"] == whole["input_ids"][:4] and cut["completion_mask"] == whole["completion_mask"][:4]
    assert notes_of(tokenize_completions, row, tokenizer, max_length=4) == ["sequence is cut at max_length=4"]


# ---- what comes out -------------------------------------------------------------------------------------------------


def test_completions_mask_the_prompt(tokenizer):
    (row,) = tokenize_completions(Dataset.from_list([{"prompt": "hi", "completion": " yes"}]), tokenizer, max_length=9)
    assert tokenizer.decode(row["input_ids"]) == "<bos>hi yes<eos>"
    assert row["completion_mask"] == [0, 0, 0, 1, 1]


def test_text_is_trained_whole_but_for_bos(tokenizer):
    (row,) = tokenize_completions(Dataset.from_list([{"text": "yes yes"}]), tokenizer, max_length=9)
    assert tokenizer.decode(row["input_ids"]) == "<bos>yes yes<eos>"
    assert row["completion_mask"] == [0, 1, 1, 1]


def test_sft_on_pairs_trains_the_chosen_completion(tokenizer):
    (row,) = tokenize_completions(Dataset.from_list([PAIR]), tokenizer, max_length=99)
    assert tokenizer.decode(row["input_ids"]) == f"<bos>{PAIR['prompt']} yes<eos>"


def test_pairs_serve_as_prompts_whatever_their_completions(tokenizer):
    (row,) = tokenize_prompts(
        Dataset.from_list([{**PAIR, "chosen": "", "rejected": ""}]), tokenizer, max_prompt_length=99
    )
    assert row["prompt_ids"] == pair_ids(tokenizer)["prompt_ids"] and row["prompt"] == PAIR["prompt"]


def test_an_implicit_prompt_is_taken_out(tokenizer):
    explicit = pair_ids(tokenizer)
    chosen, rejected = PAIR["prompt"] + PAIR["chosen"], PAIR["prompt"] + PAIR["rejected"]
    implicit = Dataset.from_list([{"chosen": chosen, "rejected": rejected}])
    (row,) = tokenize_pairs(implicit, tokenizer, max_length=99)
    assert row == explicit
    (row,) = tokenize_prompts(implicit, tokenizer, max_prompt_length=99)
    assert (row["prompt"], row["prompt_ids"]) == (PAIR["prompt"], explicit["prompt_ids"])


@pytest.mark.parametrize(
    "chosen, rejected, prompt",
    [
        ("The sky is blue.", "The sky is black.", "The sky is"),
        ("The sky is blue.", "The sky isn't blue.", "The sky"),
        ("a\nb c", "a\nb d", "a\nb"),
        ("\n\nHuman: hi\n\nAssistant: I think so", "\n\nHuman: hi\n\nAssistant: I know", "\n\nHuman: hi\n\nAssistant:"),
    ],
)
def test_an_implicit_prompt_ends_before_the_answers_begin(tokenizer, chosen, rejected, prompt):
    row = tokenize_pairs(Dataset.from_list([{"chosen": chosen, "rejected": rejected}]), tokenizer, max_length=99)[0]
    assert row["prompt"] == prompt
    assert row["prompt"] + row["chosen"] == chosen and row["prompt"] + row["rejected"] == rejected


def test_other_columns_and_row_numbers_survive(tokenizer):
    rows = [
        {**PAIR, "margin": 0.5, "tags": ["a"]},
        {**PAIR, "chosen": "", "margin": 1.0, "tags": []},
        {**PAIR, "margin": 2.0},
    ]
    done = tokenize_pairs(Dataset.from_list(rows), tokenizer, max_length=99, max_bad_share=0.5)
    assert done["row"][:] == [0, 2] and done["margin"][:] == [0.5, 2.0] and done["tags"][:] == [["a"], None]
    # Rows picked from a numbered set keep their numbers.
    again = tokenize_prompts(done.select([1]), tokenizer, max_prompt_length=99)
    assert again["row"][:] == [2]


def test_the_result_does_not_depend_on_the_neighbours(tokenizer):
    rows = [{**PAIR, "chosen": " yes" * (1 + n % 30)} for n in range(1200)]
    done = tokenize_pairs(Dataset.from_list(rows), tokenizer, max_length=500, max_bad_share=0.1)
    for number in (0, 7, 1100):
        (alone,) = tokenize_pairs(Dataset.from_list([rows[number]]), tokenizer, max_length=500)
        assert alone["chosen_ids"] == done[number]["chosen_ids"]


def test_the_short_way_to_ids_is_taken_where_it_is_the_same(tokenizer):
    """Not where a tokenizer cuts, pads, splits its special tokens, or is of a class that does more with a text."""

    class Shouting(PreTrainedTokenizerFast):
        def _encode_plus(self, text, **options):
            return super()._encode_plus([one.upper() for one in text], **options)

    texts = ["The sky is blue, yes", "", "<bos>Human: hi<eos>\n\n 漢字 🙂", " yes"]
    usual = lambda given: given(texts, add_special_tokens=False)["input_ids"]  # noqa: E731
    assert plain_backend(tokenizer) is not None and ids_of(tokenizer, texts) == usual(tokenizer)
    tokenizer(texts, truncation=True, max_length=2)
    assert plain_backend(tokenizer) is None and ids_of(tokenizer, texts) == usual(tokenizer)
    tokenizer.split_special_tokens = True
    assert plain_backend(tokenizer) is None and ids_of(tokenizer, texts) == usual(tokenizer)
    shouting = Shouting(tokenizer_object=tokenizer.backend_tokenizer)
    assert plain_backend(shouting) is None and ids_of(shouting, texts) == usual(shouting) != usual(tokenizer)
