"""What is no dataset of rows, or not of this model, is refused by every trainer, with what to do in the sentence."""

from functools import partial

import pandas as pd
import pytest
import torch
from datasets import Dataset, DatasetDict

from align.data import toy
from align.errors import AlignError, DataError
from align.trainers.kto import KTOTrainer
from align.trainers.listwise_dpo import ListwiseDPOTrainer
from tests.trainers.core.test_eval_sets import METRIC, make_trainer, rows_of
from tests.trainers.pairs.preference_runs import toy_pairs
from tests.trainers.tiny_runs import tiny_model


class OfTorch(torch.utils.data.Dataset):
    def __init__(self, rows: Dataset):
        self.rows = rows

    def __getitem__(self, i):
        return self.rows[i]

    def __len__(self):
        return len(self.rows)


NO_ROWS = {
    "None": (lambda rows: None, "`train_dataset` is required: the rows to train on"),
    "list": (lambda rows: rows.to_list(), r"from_list\(rows\)"),
    "columns": (lambda rows: rows.to_dict(), "several sets by name are for eval_dataset"),
    "frame": (lambda rows: pd.DataFrame(rows.to_list()), "from_pandas"),
    "torch": (OfTorch, "got OfTorch: make one of what yields rows"),
    "name": (lambda rows: "pairs.jsonl", r"load_rows\(name\)"),
    "splits": (lambda rows: DatasetDict(train=rows, test=rows), "has several splits, choose one of: train, test"),
    "transform": (lambda rows: rows.with_transform(dict), "has a transform .* which would not be applied: .*map"),
    "no row": (lambda rows: rows.select([]), "no rows"),
}


@pytest.mark.parametrize("method", METRIC)
def test_what_is_no_dataset_is_refused_with_a_remedy(method, tmp_path):
    tokenizer, rows = toy.tokenizer(), rows_of(method, 8)
    train = partial(make_trainer, method, tmp_path, tokenizer=tokenizer)
    for name, (make, sentence) in NO_ROWS.items():
        with pytest.raises(AlignError, match=sentence):
            train(make(rows))
        if name not in ("None", "columns", "splits"):  # which an evaluation set may be
            with pytest.raises(DataError, match=sentence):
                train(rows, make(rows))


@pytest.mark.parametrize("method", METRIC)
def test_rows_that_the_model_cannot_take_are_refused(method, tmp_path):
    tokenizer, rows = toy.tokenizer(), rows_of(method, 8)
    long = "rows of the training data are longer than the 4 tokens that the model takes"
    if method == "remax":  # whose completions have to fit, too
        long = "the policy takes 4 tokens, and a prompt with its completion may have 22"
    with pytest.raises(AlignError, match=long):
        make_trainer(method, tmp_path, rows, model=tiny_model(tokenizer, max_position_embeddings=4))
    small = tiny_model(tokenizer, vocab_size=8, pad_token_id=0, eos_token_id=1)
    with pytest.raises(DataError, match="and the model has embeddings for 8 tokens: the tokenizer is not this model's"):
        make_trainer(method, tmp_path, rows, model=small)


def test_columns_with_the_names_of_tokens(tmp_path):
    """Pairs are trained from their texts whatever else they carry; demonstrations would be taken for tokens."""
    clean = toy_pairs(16)
    extra = clean.add_column("labels", [1] * 16).add_column("input_ids", [[1, 2]] * 16)
    for method in ("dpo", "reward"):
        weights = []
        for rows in (clean, extra):
            torch.manual_seed(0)
            trainer = make_trainer(method, tmp_path / method, rows, resume_changes=["data"])
            trainer.train()
            weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
        assert torch.equal(*weights)
    for name in ("labels", "input_ids"):
        rows = rows_of("sft", 8)
        with pytest.raises(DataError, match=f"the column '{name}' would be taken for tokens. Rename or remove it"):
            make_trainer("sft", tmp_path / "sft", rows.add_column(name, [1] * 8))


TOKENISED = {
    "sft": ("input_ids", "completion_mask"),
    "dpo": ("prompt_ids", "chosen_ids", "rejected_ids"),
    "reward": ("prompt_ids", "chosen_ids", "rejected_ids"),
    "remax": ("prompt_ids",),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("method", METRIC)
def test_text_in_the_columns_of_tokens(method, stream, tmp_path):
    """Where all of them are there, rows are tokenised; what is no list of numbers is a column of the user's."""

    def train(names):
        rows = rows_of(method, 8)
        for name in names:
            rows = rows.add_column(name, [f"row-{i}" for i in range(8)])
        trainer = make_trainer(method, tmp_path, rows.to_iterable_dataset() if stream else rows, max_steps=1)
        trainer.train()
        assert trainer.state.global_step == 1

    with pytest.raises(
        DataError, match=f"{TOKENISED[method][0]}', with a list of whole numbers .*Value.'string'.*: re"
    ):
        train(TOKENISED[method])
    others = {"prompt_ids", "chosen_ids", "rejected_ids", "completion_mask"} - {TOKENISED[method][0]}
    train(sorted(others))


def test_text_in_the_columns_of_tokens_of_labelled_answers_and_lists(tmp_path):
    tokenizer, pairs = toy.tokenizer(), toy_pairs(4)
    answers = pairs.select_columns(["prompt", "chosen"]).rename_column("chosen", "completion")
    rows = answers.add_column("label", [True, False] * 2)
    for name in ("prompt_ids", "completion_ids"):
        rows = rows.add_column(name, ["a"] * 4)
    with pytest.raises(DataError, match="'prompt_ids', with a list of whole numbers in each row"):
        KTOTrainer.read_rows(rows, tokenizer, max_length=32)
    lists = pairs
    for name in ("prompt_ids", "chosen_ids", "rejected_ids", "lengths"):
        lists = lists.add_column(name, ["a"] * 4)
    with pytest.raises(DataError, match="'prompt_ids', with a list of whole numbers in each row"):
        ListwiseDPOTrainer.read_rows(lists, tokenizer, max_length=32)
    masked = pairs.add_column("chosen_mask", [[1, 1]] * 4)
    with pytest.raises(
        DataError, match="'chosen_mask' is of pairs that are tokenised, and would be taken for a 0 or 1"
    ):
        make_trainer("dpo", tmp_path, masked)


def test_demonstrations_that_are_tokenised_beside_other_numbers(tmp_path):
    """A list of numbers called `prompt_ids` hid the tokens from the check of the model's vocabulary."""
    tokenizer = toy.tokenizer()
    row = {"input_ids": [3, len(tokenizer), 1], "completion_mask": [0, 1, 1], "prompt_ids": [3]}
    with pytest.raises(DataError, match=f"has token {len(tokenizer)} .*, and the model has embeddings"):
        make_trainer("sft", tmp_path, Dataset.from_list([row] * 8))
