"""Streamed rows train as the same rows from disk do: same batches, same weights, resumed too, bad rows never."""

import json

import pytest
import torch
from datasets import Dataset, IterableDataset

from align.data import load_rows, tokenize_pairs
from align.data.endless import EndlessRows
from align.data.streams import read_whole
from align.errors import AlignError, ConfigError, DataError
from tests.trainers.core.test_eval_sets import make_trainer, rows_of
from tests.trainers.tiny_runs import logged

METHODS = ("sft", "dpo", "reward")


def weights(trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def stream(rows: Dataset, shards: int = 1) -> IterableDataset:
    return rows.to_iterable_dataset(num_shards=shards)


@pytest.mark.parametrize("method", METHODS)
def test_a_stream_trains_as_the_rows_do(method, tmp_path):
    rows, evaluation = rows_of(method, 24), rows_of(method, 6, 1)
    options = {"max_steps": 4, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    options["lr_scheduler_type"] = "constant"

    def run(name, train, evaluate, resume=None, **more):
        torch.manual_seed(0)
        trainer = make_trainer(method, tmp_path / name, train, evaluate, **{**options, **more})
        trainer.train(resume)
        return trainer

    whole = run("whole", rows, evaluation, train_sampling_strategy="sequential")
    streamed = run("streamed", stream(rows, 3), {"a": stream(evaluation)}, dataloader_num_workers=2 * (method == "dpo"))
    assert torch.equal(weights(streamed), weights(whole))
    assert logged(streamed, "loss") == logged(whole, "loss")
    assert streamed.evaluate()["eval_a_loss"] == whole.evaluate()["eval_loss"]

    saved = {"save_strategy": "steps", "save_steps": 2}
    run("resumed", stream(rows), None, **{**saved, "max_steps": 2})
    resumed = run("resumed", stream(rows), None, resume=True, **saved)
    assert resumed.resume_step == 2 and torch.equal(weights(resumed), weights(whole))
    with pytest.raises(AlignError, match="of another run"):
        run("resumed", stream(rows_of(method, 24, 5)), None, resume=True, **{**saved, "max_steps": 6})


@pytest.mark.parametrize("method", METHODS)
def test_bad_rows_of_a_stream_are_named_when_they_are_reached(method, tmp_path, caplog):
    rows = rows_of(method, 30).to_list() * 5
    bad = {**rows[0], **{name: "" for name in ("completion", "chosen") if name in rows[0]}}
    train = Dataset.from_list([*rows[:120], bad, *rows[120:]])
    options = {"per_device_train_batch_size": 10, "gradient_accumulation_steps": 1}
    make_trainer(method, tmp_path / "before", stream(train), max_steps=9, **options).train()
    with pytest.raises(DataError, match=r"is empty: 1 \(row 120\)"):
        make_trainer(method, tmp_path / "reached", stream(train), max_steps=15, **options).train()
    trainer = make_trainer(method, tmp_path / "allowed", stream(train), max_steps=1, max_bad_share=0.01, **options)
    seen = [row["row"] for row, _ in zip(trainer.train_dataset.passes, range(200), strict=False)]
    assert seen == [i for i in range(151) if i != 120] and "row 120, dropped" in caplog.text


def test_rows_that_cannot_be_read_or_lack_a_column(tmp_path, tokenizer):
    """They ended in errors of pyarrow and Python where they were among the first, or no file had them."""
    pair = rows_of("dpo", 30)[0]
    answers = {name: pair[name] for name in ("chosen", "rejected")}
    path = tmp_path / "broken.jsonl"
    path.write_text(json.dumps(pair) + '\n{"prompt": \n')
    with pytest.raises(DataError, match=r"broken.jsonl, at its beginning: cannot be read: JSON parse error"):
        tokenize_pairs(load_rows(path, streaming=True), tokenizer, max_length=None)
    with pytest.raises(DataError, match=r"the stream to evaluate on, at its beginning: cannot be read"):
        read_whole(load_rows(path, streaming=True))
    rows = IterableDataset.from_generator(lambda: iter([pair] * 150 + [answers] * 2))
    expected = r"prompt is missing: 2 \(rows 150, 151\). max_bad_share=0.001 allows 1. .* max_bad_share=0.002 or more"
    with pytest.raises(DataError, match=expected):
        list(tokenize_pairs(rows, tokenizer, max_length=None, max_bad_share=0.001))


def test_processes_share_the_rows_without_repeats():
    rows = stream(Dataset.from_dict({"n": list(range(10))}))
    shares = []
    for rank in range(2):
        endless = iter(EndlessRows(rows, rows, batch=2, rank=rank, world=2))
        shares.append([next(endless)["n"] for _ in range(10)])
    assert shares[0] == [0, 1, 4, 5, 8, 9, 2, 3, 6, 7] and shares[1] == [2, 3, 6, 7, 0, 1, 4, 5, 8, 9]


def test_a_shuffled_stream_shuffles_anew_in_each_pass():
    rows = stream(Dataset.from_dict({"n": list(range(20))})).shuffle(seed=0, buffer_size=20)
    endless = iter(EndlessRows(rows, rows, batch=2))
    first, second = ([next(endless)["n"] for _ in range(20)] for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(20)) and first != second


@pytest.mark.parametrize("method", METHODS)
def test_what_a_stream_cannot_do_is_a_sentence(method, tmp_path):
    rows = stream(rows_of(method, 8))
    with pytest.raises(ConfigError, match="the rows are a stream, whose end is not known: set max_steps"):
        make_trainer(method, tmp_path, rows, max_steps=-1)
    if method == "dpo":
        with pytest.raises(ConfigError, match="goes through all pairs before training, and the rows are a stream"):
            make_trainer(method, tmp_path, rows, precompute_ref_log_probs=True)
    long = rows_of(method, 8).map(lambda row: {"prompt": "describe the garden : " * 20})
    trainer = make_trainer(method, tmp_path, stream(long), max_steps=1, max_length=500)
    with pytest.raises(DataError, match="row 0 of the stream has .* tokens and the model takes 64: set max_length: 64"):
        trainer.train()
    with pytest.raises(DataError, match="the stream has no rows"):
        make_trainer(method, tmp_path, IterableDataset.from_generator(lambda: iter(())), max_steps=1)


@pytest.mark.parametrize("kind", ["text", "formatted", "tokenised", "with labels"])
def test_every_pass_of_a_shuffled_stream_has_its_own_order(kind, tmp_path):
    """`map` of `datasets` would keep the first one."""
    from align.data import tokenize_completions, toy
    from align.trainers.sft import SFTTrainer
    from tests.trainers.tiny_runs import sft_config, tiny_model

    tokenizer, rows, options = toy.tokenizer(), rows_of("sft", 12), {}
    if kind == "formatted":
        options["formatting_func"] = lambda row: row["prompt"] + row["completion"]
    elif kind != "text":
        rows = tokenize_completions(rows, tokenizer, max_length=32)
    if kind == "with labels":
        rows = rows.map(lambda row: {"labels": row["input_ids"]}).select_columns(["input_ids", "labels"])
    trainer = SFTTrainer(
        tiny_model(tokenizer),
        sft_config(tmp_path, max_steps=4),
        stream(rows).shuffle(seed=0, buffer_size=20),
        processing_class=tokenizer,
        **options,
    )
    endless = trainer.train_dataset.rows()
    first, second = ([tuple(next(endless)["input_ids"]) for _ in range(12)] for _ in range(2))
    assert sorted(first) == sorted(second) and first != second
    assert [tuple(ids) for ids in trainer.train_dataset.first(12)["input_ids"]] == first  # whatever was read before


@pytest.mark.parametrize("streamed", [False, True])
def test_rows_whose_trained_tokens_lie_behind_the_limit_are_refused(streamed, tmp_path):
    """TRL would cut them and then leave them out without a word."""
    from align.data import toy
    from align.trainers.sft import SFTTrainer
    from tests.trainers.tiny_runs import sft_config, tiny_model

    ids = [[2, 3, 4, 5, 6, 7]] * 2
    tokenizer, config = toy.tokenizer(), sft_config(tmp_path, max_steps=1, max_length=4)
    for column, values in (("completion_mask", [0, 0, 1, 1, 1, 1]), ("labels", [-100, -100, 4, 5, 6, 7])):
        late = [0, 0, 0, 0, 1, 1] if column == "completion_mask" else [-100] * 4 + [6, 7]
        rows = Dataset.from_dict({"input_ids": ids, column: [values, late]})
        with pytest.raises(DataError, match="row.* 1 .*trains? no token|train no token: rows .1"):
            trainer = SFTTrainer(
                tiny_model(tokenizer), config, stream(rows) if streamed else rows, processing_class=tokenizer
            )
            trainer.train()
