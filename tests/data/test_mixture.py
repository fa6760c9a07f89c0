"""Several datasets as one: exact counts, one order, rows that keep their numbers."""

from collections import Counter

import pytest
from datasets import Dataset, Value

from align.cli import build
from align.config.resolve import resolve
from align.data.mixture import MixturePart, load_mixture, mix, parse_mixture
from align.errors import ConfigError, DataError


def rows(name: str, count: int, **columns) -> Dataset:
    return Dataset.from_list([{"prompt": f"{name}{i}", "completion": " so", **columns} for i in range(count)])


def mixed(*parts, seed=0) -> Dataset:
    """parts: (rows, weight)."""
    return mix([(data, MixturePart(path=f"{i}.jsonl", weight=weight)) for i, (data, weight) in enumerate(parts)], seed)


def test_an_epoch_has_exactly_the_rows_that_the_weights_say():
    both = mixed((rows("a", 10), 1), (rows("b", 10), 0.3), (rows("c", 4), 2.5))
    times = Counter(both["prompt"])
    by_set = {name: [n for prompt, n in times.items() if prompt.startswith(name)] for name in "abc"}
    assert by_set["a"] == [1] * 10 and by_set["b"] == [1] * 3 and sorted(by_set["c"]) == [2, 2, 3, 3]
    assert "23 rows per epoch: 10 of 10 rows from 0.jsonl (weight 1, rows 0 to 9)" in both.info.description
    assert "10 of 4 rows from 2.jsonl (weight 2.5, rows 20 to 23)" in both.info.description
    first = {"a": 0, "b": 10, "c": 20}
    assert all(row["row"] == first[row["prompt"][0]] + int(row["prompt"][1:]) for row in both)
    assert len({prompt[0] for prompt in both["prompt"][:8]}) > 1  # not one dataset after the other


def test_the_seed_draws_rows_and_order():
    parts = (rows("a", 20), 0.5), (rows("b", 20), 1)
    one, again, other = (mixed(*parts, seed=seed)["prompt"] for seed in (0, 0, 1))
    assert one == again
    assert {p for p in one if p[0] == "a"} != {p for p in other if p[0] == "a"}


def test_further_columns_may_differ_and_formats_may_not():
    both = mixed((rows("a", 2, topic="x"), 1), (rows("b", 2), 1))
    assert {row["prompt"][0]: row["topic"] for row in both} == {"a": "x", "b": None}
    chat = Dataset.from_list([{"messages": [{"role": "user", "content": "hi"}]}])
    with pytest.raises(DataError, match=r"datasets.1 \(1.jsonl\) has messages: datasets of a mixture have one format"):
        mixed((rows("a", 2), 1), (chat, 1))
    with pytest.raises(DataError, match="columns of different types"):
        mixed((rows("a", 2, topic="x"), 1), (rows("b", 2, topic=[1]), 1))
    with pytest.raises(DataError, match=r"datasets.0 \(0.jsonl\): weight 0.1 of 4 rows takes no row"):
        mixed((rows("a", 4), 0.1))


def test_columns_of_one_name_become_one_type():
    """A .csv file beside a .jsonl file was refused (two kinds of text), and so were margins of 1 and 0.5, and messages
    of which some have a name."""
    one = rows("a", 2, margin=1, empty=None)
    other = rows("b", 2, margin=0.5, empty="x")
    other = other.cast_column("prompt", Value("large_string"))
    both = mixed((one, 1), (other, 1))
    assert {row["prompt"]: (row["margin"], row["empty"]) for row in both} == {
        **dict.fromkeys(("a0", "a1"), (1.0, None)),
        **dict.fromkeys(("b0", "b1"), (0.5, "x")),
    }
    said = {"role": "user", "content": "hi"}
    named = {**said, "name": "Ann"}
    both = mixed((Dataset.from_list([{"prompt": [said]}]), 1), (Dataset.from_list([{"prompt": [named]}]), 1))
    assert {row["row"]: row["prompt"] for row in both} == {0: [{**said, "name": None}], 1: [named]}


@pytest.mark.parametrize("column", ["conversations", "messages"])
def test_sharegpt_stands_beside_messages(column):
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    both = mixed((Dataset.from_list([{column: turns, "id": 1}]), 1), (Dataset.from_list([{"messages": chat}]), 1))
    assert list(both["messages"]) == [chat, chat] and sorted(both.column_names) == ["id", "messages", "row"]


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (
            "a.jsonl",
            r"datasets: 'a.jsonl' is no list: write dataset_name: a.jsonl .*datasets: \[\{path: a.jsonl\}, ...\]",
        ),
        (["a.jsonl"], r"datasets.0: 'a.jsonl' is no section: write \{path: a.jsonl\}"),
        ({"path": "a.jsonl"}, "datasets: expected a list, .*: put it in brackets"),
    ],
)
def test_what_is_no_list_of_sections_is_answered_with_what_to_write(value, sentence):
    with pytest.raises(ConfigError, match=sentence):
        parse_mixture(value)


def test_a_run_trains_on_a_mixture(tmp_path):
    rows("a", 6, topic="x").to_json(tmp_path / "a.jsonl")
    rows("b", 6).to_json(tmp_path / "b.jsonl")
    config = tmp_path / "run.yaml"
    config.write_text(
        "model_name_or_path: any\nuse_cpu: true\ndatasets:\n"
        f"  - {{path: {tmp_path}/a.jsonl, columns: [prompt, completion]}}\n"
        f'  - {{path: {tmp_path}/b.jsonl, split: "train[:4]", weight: 2}}\n'
    )
    run = resolve("sft", str(config), ["--mixture_seed", "3"])
    trained = build.train_rows(run)
    parts = parse_mixture(run.data.datasets)
    assert trained.to_list() == load_mixture(parts, 3).to_list() and len(trained) == 14
    assert set(trained.column_names) == {"prompt", "completion", "row"}
    run = resolve("sft", str(config), ["--eval_strategy", "steps"])
    with pytest.raises(ConfigError, match="set eval_dataset_name"):
        build.eval_rows(run)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--datasets", "[{path: a.jsonl, wait: 2}]"], "unknown key datasets.0.wait of a dataset of the mixture"),
        (["--datasets", "[{path: a.jsonl, weight: 0}]"], "datasets.0.weight: input should be greater than 0"),
        (["--datasets", "[{weight: 1}]"], "datasets.0: a dataset of the mixture needs 'path'"),
        (["--datasets", "[]"], "the list is empty"),
        (["--datasets", "[{path: a.jsonl}]", "--streaming", "true", "--max_steps", "3"], "leave it out"),
        (["--mixture_seed", "2", "--dataset_name", "a.jsonl"], "mixture_seed needs datasets"),
        ([], "needs dataset_name"),
    ],
)
def test_what_is_no_mixture_is_refused(options, message):
    with pytest.raises(ConfigError) as error:
        resolve("sft", None, ["--model_name_or_path", "any", "--use_cpu", "true", *options])
    assert message in str(error.value)
