"""Rows that the model cannot take are refused before training, by every kind of trainer."""

import pytest
from datasets import Dataset
from transformers import LlamaForSequenceClassification

from align import DPOConfig, DPOTrainer, ReMaxConfig, ReMaxTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from align.errors import ConfigError, DataError
from align.trainers.listwise_dpo import ListwiseDPOConfig, ListwiseDPOTrainer
from align.trainers.ppo import PPOConfig, PPOTrainer
from align.trainers.srpo import SRPOConfig, SRPOTrainer
from tests.trainers.tiny_runs import QUIET, tiny_model, wanted_words

PAIR = {"prompt": "describe the garden : ", "chosen": "rose soil", "rejected": "wave"}
LONG = {**PAIR, "chosen": "rose " * 40, "prompt": "describe the garden : " * 10}


def classifier(tokenizer, **sizes):
    config = tiny_model(tokenizer, **sizes).config
    config.num_labels = 1
    return LlamaForSequenceClassification(config)


def make(method, args, rows, tok, **sizes):
    if method == "reward":
        return RewardTrainer(classifier(tok, **sizes), RewardConfig(**args), rows, processing_class=tok)
    model = tiny_model(tok, **sizes)
    if method == "remax":
        args = ReMaxConfig(**args, rollout="transformers", max_completion_length=4)
        return ReMaxTrainer(model, wanted_words, args, rows, processing_class=tok)
    trainer, config = {"sft": (SFTTrainer, SFTConfig), "dpo": (DPOTrainer, DPOConfig)}[method]
    return trainer(model, config(**args), rows, processing_class=tok)


@pytest.mark.parametrize("method", ["sft", "dpo", "reward", "remax"])
def test_tokens_without_an_embedding(method, tokenizer, tmp_path):
    rows = Dataset.from_list([{**PAIR, "prompt": ""}, PAIR])  # the first is dropped
    args = {"output_dir": str(tmp_path), "max_steps": 1, "max_bad_share": 0.5, **QUIET}
    known = tokenizer.convert_tokens_to_ids("garden")
    with pytest.raises(DataError, match=r"row 1 of the training data has token \d+ \(.*resize_token_embeddings"):
        make(method, args, rows, tokenizer, vocab_size=known - 1)


@pytest.mark.parametrize("stream", [False, True])
def test_numbers_that_are_no_tokens(stream, tokenizer, tmp_path):
    args = {"output_dir": str(tmp_path), "max_steps": 1, "per_device_train_batch_size": 2, **QUIET}
    pair, whole = {"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [7]}, {"input_ids": [5, 6], "labels": [5, 6]}
    for method, good, change, said in (
        ("dpo", pair, {"rejected_ids": [-1]}, "row 1 .* has -1 among its tokens, which count from 0"),
        ("dpo", pair, {"rejected_ids": [7, None]}, "row 1 .* among its tokens, which count from 0"),
        ("sft", whole, {"input_ids": [5, -6]}, "row.* has -6 among its tokens"),
        ("sft", whole, {"labels": [-100, 999_999]}, "row.* has token 999999 "),
    ):
        rows = Dataset.from_list([good, {**good, **change}])
        with pytest.raises(DataError, match=said):
            make(method, args, rows.to_iterable_dataset() if stream else rows, tokenizer).train()


SRPO_PAIR = {"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [7], "revise_chosen_ids": [5, 6]}
LIST = {"prompt_ids": [5, 6], "chosen_ids": [7, 1], "rejected_ids": [8, 1, 9, 1], "lengths": [2, 2, 2]}


@pytest.mark.parametrize(
    "trainer, config, good, change",
    [
        (SRPOTrainer, SRPOConfig, {**SRPO_PAIR, "revise_rejected_ids": [5, 7]}, {"revise_rejected_ids": []}),
        (ListwiseDPOTrainer, ListwiseDPOConfig, LIST, {"prompt_ids": []}),
        (ListwiseDPOTrainer, ListwiseDPOConfig, LIST, {"lengths": None}),
        (DPOTrainer, DPOConfig, SRPO_PAIR, {"prompt_ids": []}),
    ],
)
def test_a_tokenised_answer_to_no_prompt(trainer, config, good, change, tokenizer, tmp_path):
    """Its first token was predicted at the end of the row above, in silence."""
    rows, args = Dataset.from_list([good, {**good, **change}]), config(output_dir=str(tmp_path), **QUIET)
    with pytest.raises(DataError, match=rf"1 tokenised .* have an empty {next(iter(change))}: rows \[1\]"):
        trainer(tiny_model(tokenizer), args, rows, processing_class=tokenizer)


@pytest.mark.parametrize("own", ["a", None])
def test_a_column_row_that_is_no_number_is_not_the_rows_number(own, tokenizer, tmp_path):
    ids = {"prompt_ids": [3], "chosen_ids": [5], "rejected_ids": [4]}
    rows = Dataset.from_list([{**ids, "row": "b" if own else 7}, {**ids, "row": own}])
    trainer = make("dpo", {"output_dir": str(tmp_path), **QUIET}, rows, tokenizer)
    assert trainer.train_dataset["row"][:] == [0, 1]


@pytest.mark.parametrize("column", [[999_999], list(range(70)), "of another library"])
def test_a_column_of_the_users_is_no_row_of_tokens(column, tokenizer, tmp_path):
    """`input_ids` of another tokenizer beside a prompt was refused as tokens that the model does not know."""
    rows, seen = Dataset.from_list([{"prompt": PAIR["prompt"], "input_ids": column}] * 2), []

    def reward(completions, input_ids):
        seen.extend(input_ids)
        return [0.0] * len(completions)

    sizes = {"max_steps": 1, "max_prompt_length": 16, "max_completion_length": 4, "per_device_train_batch_size": 2}
    args = ReMaxConfig(output_dir=str(tmp_path), rollout="transformers", **sizes, **QUIET)
    ReMaxTrainer(tiny_model(tokenizer), reward, args, rows, processing_class=tokenizer).train()
    assert seen == [column] * 4
    with pytest.raises(DataError, match="have the column .prompt_ids., .* rename or remove it"):
        named = rows.rename_column("input_ids", "prompt_ids").map(lambda row: {"prompt_ids": "a name"})
        ReMaxTrainer(tiny_model(tokenizer), wanted_words, args, named, processing_class=tokenizer)


@pytest.mark.parametrize("method", ["sft", "dpo", "reward"])
def test_rows_beyond_the_models_positions(method, tokenizer, tmp_path):
    empty = {**PAIR, "chosen": "", "rejected": ""}  # dropped: rows keep the numbers of the file
    rows = Dataset.from_list([PAIR, empty, LONG, *[PAIR] * 3, *[LONG] * 6])
    args = {"output_dir": str(tmp_path), "max_steps": 1, "max_bad_share": 0.1, **QUIET}
    said = r"7 rows .* longer than the 64 tokens .*; rows 2, 6, 7, 8, 9 and 2 more\): set max_length: 64"
    with pytest.raises(DataError, match=said):
        make(method, args, rows, tokenizer)


@pytest.mark.parametrize("method", ["sft", "dpo", "reward", "remax"])
def test_rows_that_only_an_evaluation_is_given(method, tokenizer, tmp_path):
    """They ended in an index error, and positions that a rotary model does not have gave a number."""
    rows, args = Dataset.from_list([PAIR] * 2), {"output_dir": str(tmp_path), "max_steps": 1, **QUIET}
    last, known = tokenizer.convert_ids_to_tokens(len(tokenizer) - 1), len(tokenizer) - 1
    evaluated = Dataset.from_list([{**PAIR, "prompt": f"describe the {last} : "}])
    args |= {"beta": 0.1} if method == "remax" else {}
    trainer = make(method, args, rows, tokenizer, vocab_size=known)
    for given in (evaluated, {"more": evaluated}):
        with pytest.raises(DataError, match=rf"row 0 of the evaluation data has token {known} \({last}\)"):
            trainer.evaluate(given)
    if method == "dpo":
        with pytest.raises(DataError, match=rf"row 0 of the evaluation data has token {known} \({last}\)"):
            trainer.predict(evaluated)
    if method != "remax":  # of prompts too long is another check
        trainer = make(method, args, rows, tokenizer, max_position_embeddings=20)
        with pytest.raises(DataError, match=r"1 rows of the evaluation data are longer than the 20 tokens"):
            trainer.evaluate(Dataset.from_list([LONG]))


@pytest.mark.parametrize("given", ["stream", "evaluation"])
def test_rows_that_the_reference_cannot_take(given, tokenizer, tmp_path):
    args = DPOConfig(output_dir=str(tmp_path), max_steps=1, **QUIET)
    rows, few = Dataset.from_list([PAIR]), tiny_model(tokenizer, max_position_embeddings=20)
    long, model = Dataset.from_list([{**PAIR, "chosen": "rose " * 30}]), tiny_model(tokenizer)
    train = long.to_iterable_dataset() if given == "stream" else rows
    trainer = DPOTrainer(model, args, train, processing_class=tokenizer, ref_model=few)
    with pytest.raises(DataError, match="(row 0 of the stream has .* the reference takes 20|20 tokens that the ref)"):
        trainer.train() if given == "stream" else trainer.evaluate(long)


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
@pytest.mark.parametrize("streamed", [False, True], ids=["rows", "stream"])
def test_packed_rows_whose_documents_fit(strategy, streamed, tokenizer, tmp_path):
    """Each document's positions begin at 0; those of `wrapped`, which cuts documents anywhere, do not."""
    rows = Dataset.from_list([PAIR] * 40)
    args = {"output_dir": str(tmp_path), "max_steps": 2, "packing": True, "max_length": 128, **QUIET}
    rows = rows.to_iterable_dataset() if streamed else rows
    if strategy == "wrapped":
        with pytest.raises(DataError, match="model takes"):
            make("sft", {**args, "packing_strategy": strategy}, rows, tokenizer).train()
        return
    trainer = make("sft", args, rows, tokenizer)
    trainer.train()
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].shape[1] > 64 > batch["position_ids"].max()
    if not streamed:
        with pytest.raises(DataError, match="longer than the 64 tokens"):
            make("sft", args, Dataset.from_list([PAIR, LONG]), tokenizer)


@pytest.mark.parametrize("method", ["sft", "dpo", "reward", "remax"])
def test_rows_that_would_change_their_neighbours_positions(method, tokenizer, tmp_path):
    """Dynamic ones follow the longest row of a batch, and vLLM has none beyond the model's; what is stretched for all
    lengths has no limit. LongRoPE has a choice: test_long_rope."""
    rows, args = Dataset.from_list([PAIR, LONG]), {"output_dir": str(tmp_path), "max_steps": 1, **QUIET}
    args |= {"max_prompt_length": 60} if method == "remax" else {}
    scaled, original = {"rope_theta": 1e4, "factor": 4.0}, {"original_max_position_embeddings": 20}
    reason = r" 20 tokens.* \(dynamic rotary positions: the longest row of a batch changes those of all\)"
    with pytest.raises((DataError, ConfigError), match=reason):
        make(
            method,
            args,
            rows,
            tokenizer,
            max_position_embeddings=20,
            rope_parameters={"rope_type": "dynamic", **scaled},
        )
    make(method, args, rows, tokenizer, rope_parameters={"rope_type": "yarn", **scaled, **original})


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_reference_that_cannot_read_the_rows(method, tokenizer, tmp_path):
    rows, args = Dataset.from_list([PAIR]), {"output_dir": str(tmp_path), "max_steps": 1, **QUIET}
    known = tokenizer.convert_tokens_to_ids("garden")
    for sizes, reason in (({"vocab_size": known - 1}, "row 0 .* and the reference has embeddings for"),
                          ({"max_position_embeddings": 6}, "than the 6 tokens that the reference takes")):  # fmt: skip
        reference = tiny_model(tokenizer, **sizes)
        with pytest.raises(DataError, match=reason):
            if method == "dpo":
                DPOTrainer(tiny_model(tokenizer), DPOConfig(**args), rows, None, tokenizer, ref_model=reference)
            else:
                config = SFTConfig(**args, implicit_reward_beta=0.1)
                SFTTrainer(tiny_model(tokenizer), config, rows, processing_class=tokenizer, ref_model=reference)


@pytest.mark.parametrize("name", ["reference", "critic"])
def test_a_model_beside_the_policy_that_cannot_read_its_completions(name, tokenizer, tmp_path):
    rows, args = Dataset.from_list([PAIR]), {"output_dir": str(tmp_path / "run"), "max_steps": 1, **QUIET}
    args |= {"rollout": "transformers", "max_prompt_length": 16, "max_completion_length": 4}
    for sizes, reason in (({"vocab_size": len(tokenizer) - 1}, "has embeddings for .* and the policy's tokenizer has"),
                          ({"max_position_embeddings": 19}, "takes 19 tokens, and .* may have 20: lower")):  # fmt: skip
        other, folder = tiny_model(tokenizer, **sizes), None
        if name == "critic":
            other.save_pretrained(folder := str(tmp_path / "critic"))
        config = PPOConfig(**args, critic_model_name_or_path=folder)
        with pytest.raises(ConfigError, match=f"the {name} {reason}"):
            PPOTrainer(
                tiny_model(tokenizer), wanted_words, config, rows, processing_class=tokenizer,
                ref_model=None if folder else other,
            )  # fmt: skip
