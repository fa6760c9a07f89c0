"""Rows that are tokenised already are looked at many at once: one by one, `datasets` takes 17 s for a million."""

from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset, Features, LargeList, List, Value

from align.data import toy
from align.data import unpaired as unpaired_rows
from align.data.collate import cut_rows, untrained_rows
from align.data.sets import AT_ONCE, rows_of
from align.data.unpaired import tokenize_unpaired
from align.errors import DataError
from align.trainers.kto import KTOConfig, KTOTrainer
from align.trainers.listwise_dpo import ListwiseDPOTrainer
from align.trainers.on_policy.samples import check_lengths
from align.trainers.pairs.data import numbered_pairs, with_score_margins
from align.trainers.sft import SFTTrainer
from align.trainers.supervised.tokenised import trains
from tests.trainers.tiny_runs import QUIET, sft_config, tiny_model


@pytest.fixture
def in_bulk(monkeypatch):
    """Nothing may iterate over a dataset, or over a column of one, nor call a function for each row; the first row may
    be looked at."""
    kept = Dataset.map

    def one_by_one(self):
        yield self[0]
        raise AssertionError("rows are read one by one")

    def batched(self, *args, **options):
        assert options.get("batched"), options.get("desc")
        return kept(self, *args, **options)

    monkeypatch.setattr(Dataset, "__iter__", one_by_one)
    monkeypatch.setattr(Dataset, "map", batched)


def lists(lengths, start: int = 3) -> list[list[int]]:
    return [list(range(start, start + length)) for length in lengths]


def tokenised_pairs(count: int, **columns) -> Dataset:
    ids = {"prompt_ids": lists([4] * count), "chosen_ids": lists([3] * count), "rejected_ids": lists([2] * count)}
    return Dataset.from_dict({**ids, **columns})


def tokenised_answers(count: int, labels=None) -> Dataset:
    ids = {"prompt_ids": lists(range(1, count + 1)), "completion_ids": lists([3] * count)}
    return Dataset.from_dict({**ids, "label": labels or [number % 2 == 0 for number in range(count)]})


def test_sft(in_bulk, tmp_path):
    rows = {"input_ids": lists([6] * 12), "completion_mask": [[0, 0, 0, 1, 1, 1]] * 12, "score": [0.5] * 12}
    args = sft_config(tmp_path, max_length=4, implicit_reward_beta=0.1)
    trainer = SFTTrainer(tiny_model(toy.tokenizer()), args, Dataset.from_dict(rows), processing_class=toy.tokenizer())
    assert trainer.train_dataset["labels"][:] == [[-100, -100, -100, 6]] * 12
    with pytest.raises(DataError, match=r"12 tokenised rows train no token: rows \[0, 1, 2"):
        SFTTrainer(
            tiny_model(toy.tokenizer()),
            sft_config(tmp_path, max_length=3),
            Dataset.from_dict(rows),
            processing_class=toy.tokenizer(),
        )


def test_kto(in_bulk, tmp_path):
    args = KTOConfig(output_dir=str(tmp_path), max_length=32, **QUIET)
    trainer = KTOTrainer(tiny_model(toy.tokenizer()), args, tokenised_answers(12), processing_class=toy.tokenizer())
    assert trainer.train_dataset["label"][:] == [True, False] * 6 and len(trainer.train_dataset["rejected_ids"][0]) == 3


def test_pairs_and_lists(in_bulk):
    good = tokenised_pairs(12, margin=[1.0] * 12)
    assert len(numbered_pairs(good, None, max_length=16, max_bad_share=0)) == 12
    with pytest.raises(DataError, match="tokenised pairs, row 7: margin is not a finite number"):
        numbered_pairs(tokenised_pairs(12, margin=[1.0] * 7 + [np.inf] * 5), None, max_length=16, max_bad_share=0)
    scored = with_score_margins(tokenised_pairs(12, chosen_score=[3] * 12, rejected_score=[1] * 12), "train", scale=2)
    assert with_score_margins(scored, "train", scale=2)["margin"][:] == [4.0] * 12
    with pytest.raises(DataError, match="train: score_margin needs numbers, and chosen_score holds .*string"):
        with_score_margins(tokenised_pairs(2, chosen_score=["good"] * 2, rejected_score=[1] * 2), "train", scale=2)
    read = ListwiseDPOTrainer.read_rows
    rows = read(tokenised_pairs(12), None, max_length=16, max_bad_share=0.0)
    assert read(rows, None, max_length=16)["lengths"][:] == [[3, 2]] * 12
    with pytest.raises(DataError, match="tokenised list 0 has an answer that ends beyond max_length=6"):
        read(rows, None, max_length=6)
    with pytest.raises(
        DataError, match=r"3 tokenised prompts are longer than max_prompt_length=9 \(row 9 and others\)"
    ):
        check_lengths(tokenised_answers(12), 9)


def test_rows_of():
    rows = Dataset.from_dict({"a": list(range(2 * AT_ONCE + 3)), "b": ["x"] * (2 * AT_ONCE + 3)})
    assert list(rows_of(rows, ["a"])) == rows.select_columns(["a"]).to_list()


@pytest.mark.parametrize("kind", [List(Value("int8")), LargeList(Value("int64")), List(Value("bool"))])
@pytest.mark.parametrize("limit", [None, 1, 2, 3])
def test_rows_that_train_nothing_are_those_of_the_rule_for_one_row(kind, limit):
    draw = np.random.default_rng(0)
    rows = []
    for _ in range(400):
        length = draw.integers(0, 5)
        mask, labels = draw.random(length) < 0.3, draw.choice([-100, -100, 5], length)
        rows.append({"completion_mask": mask.tolist(), "labels": labels.tolist()})
        for name in rows[-1]:
            if draw.random() < 0.1:
                rows[-1][name] = None
    data = Dataset.from_list(rows, Features({"completion_mask": kind, "labels": List(Value("int64"))}))
    for part in (data, data.select(range(0, 400, 3)), data.select(range(100, 200)), data.select([])):
        assert untrained_rows(part, limit).tolist() == [n for n, row in enumerate(part) if not trains(row, limit)]
    if limit is not None:
        cut = cut_rows(data, limit)
        assert cut.features == data.features
        assert cut.to_list() == [{k: v and v[:limit] for k, v in row.items()} for row in data.to_list()]


@pytest.mark.parametrize("labels", ["bool", "int8", "float32", "double"])
@pytest.mark.parametrize("numbers", [None, "text", "own"])
def test_labelled_answers_are_what_the_recipe_makes_of_them(labels, numbers, monkeypatch):
    rows = tokenised_answers(10).cast_column("label", Value("int8")).cast_column("label", Value(labels))
    if numbers is not None:
        rows = rows.add_column("row", [n if numbers == "own" else str(n) for n in range(10, 0, -1)])
    found = tokenize_unpaired(rows, SimpleNamespace(), max_length=13)
    monkeypatch.setattr(unpaired_rows, "_usable", lambda *_: False)
    expected = tokenize_unpaired(rows, SimpleNamespace(), max_length=13)
    assert found.features["label"] == expected.features["label"]
    assert found.select_columns(expected.column_names).to_list() == expected.to_list()


def test_labelled_answers_that_need_the_recipe():
    cut = tokenize_unpaired(tokenised_answers(10), SimpleNamespace(), max_length=12)
    assert len(cut["completion_ids"][9]) == 2
    for labels, problem in (([0.5] * 10, "label is 0.5"), ([None] + [True] * 9, r"label is missing: 1 \(row 0\)")):
        with pytest.raises(DataError, match=problem):
            tokenize_unpaired(tokenised_answers(10, labels), SimpleNamespace(), max_length=None)
    empty = tokenised_answers(10).map(
        lambda row, n: {"completion_ids": [] if n == 4 else row["completion_ids"]}, with_indices=True
    )
    with pytest.raises(DataError, match=r"completion_ids is empty: 1 \(row 4\)"):
        tokenize_unpaired(empty, SimpleNamespace(), max_length=None)
