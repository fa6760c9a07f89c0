"""The parts of the loop for pairs, each alone: no trainer is made here."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from tqdm.auto import tqdm

from align.data import toy
from align.errors import DataError, TrainingError
from align.modeling.load import Reference
from align.modeling.pairs import pair_tokens
from align.objectives.pair_losses import PairLosses
from align.trainers.core.micro_batches import MicroBatchLists, in_lists
from align.trainers.pairs import reference_file
from align.trainers.pairs.data import PairData, beginnings, flat_column, list_column
from align.trainers.pairs.evaluation import PairEvaluator, pairs_table, rewards_figure
from align.trainers.pairs.loop import check_finite
from align.trainers.pairs.metrics import BatchMeans
from align.trainers.pairs.micro_batches import MicroBatchPlanner, PaddedPairs, SharedPrefixPairs, split_to
from align.trainers.pairs.reference import cached_tokens, compute_logps, live_tokens, make_reference
from align.trainers.pairs.reference_cache import ReferenceCache
from align.trainers.pairs.reference_file import COLUMNS
from align.trainers.pairs.reference_shards import ReferenceShards
from tests.trainers.pairs.preference_runs import toy_pairs
from tests.trainers.tiny_runs import tiny_model

# ---- micro-batches ---------------------------------------------------------------------------------------------------


def rows_of(*lengths) -> list[dict]:
    return [
        {"row": i, "prompt_ids": [9] * prompt, "chosen_ids": [1] * chosen, "rejected_ids": [2] * rejected}
        for i, (prompt, chosen, rejected) in enumerate(lengths)
    ]


def numbers(batches) -> list[list[int]]:
    return [[row["row"] for row in batch] for batch in batches]


def test_padded_micro_batches_are_of_similar_length_and_within_the_budget():
    padded, rows = PaddedPairs(0), rows_of((10, 5, 2), (1, 1, 1), (4, 2, 1), (20, 1, 5), (2, 1, 1), (3, 2, 2))
    assert [padded.tokens_of(row) for row in rows] == [30, 4, 12, 50, 6, 10]
    assert numbers(padded.cut(rows, 2, None)) == [[3, 0], [2, 5], [4, 1]]
    batches = padded.cut(rows, None, 36)
    assert numbers(batches) == [[3], [0], [2, 5, 4], [1]]
    assert all(padded(batch)["input_ids"].numel() <= 36 for batch in batches[1:])
    assert [len(batch) for batch in split_to(batches, 5)] == [1, 1, 1, 2, 1]
    assert [len(batch) for batch in split_to(batches, 9)] == [1] * 6 and split_to(batches, 2) == batches


def test_shared_prefix_micro_batches_hold_no_more_tokens_than_the_budget():
    shared, rows = SharedPrefixPairs(), rows_of((10, 5, 2), (1, 1, 1), (4, 2, 1), (20, 1, 5), (2, 1, 1), (3, 2, 2))
    assert [shared.tokens_of(row) for row in rows] == [17, 3, 7, 26, 4, 7]
    assert sorted(map(len, shared.cut(rows, 4, None))) == [2, 4]
    batches = shared.cut(rows, None, 22)
    assert sorted(sum(numbers(batches), [])) == [0, 1, 2, 3, 4, 5]
    assert [shared(batch)["input_ids"].numel() for batch in batches] == [26, 21, 17]
    same_start = {"prompt_ids": [3, 4], "chosen_ids": [5, 6, 7], "rejected_ids": [5, 6, 8, 9]}
    assert shared.tokens_of(same_start) == 2 + 2 + 1 + 2 == shared([same_start])["input_ids"].numel()


ROWS = ((10, 5, 2), (1, 1, 1), (4, 2, 1), (20, 1, 5), (2, 1, 1), (3, 2, 2))


def alone(counts):
    return counts


def test_a_step_is_planned_from_the_rows_of_all_its_batches():
    rows = rows_of(*ROWS)
    step = MicroBatchPlanner(PaddedPairs(0), max_pairs=2).plan([rows[:4], rows[4:]], alone)
    assert [batch["row"].tolist() for batch in step.batches] == [[3, 0], [2, 5], [4, 1]] and step.pairs == 6
    assert all(batch["mean_chosen_length"] == 2.0 for batch in step.batches)
    given = MicroBatchPlanner(PaddedPairs(0), max_pairs=4, as_given=True).plan([rows[:4], rows[4:]], alone)
    assert [batch["row"].tolist() for batch in given.batches] == [[0, 1, 2, 3], [4, 5]]


def test_a_step_makes_as_many_micro_batches_as_the_process_with_most():
    rows = rows_of(*ROWS)
    seen = []

    def two_processes(counts):
        seen.append(counts.tolist())
        return torch.cat([counts, torch.tensor([[2, 18, 5]])])

    step = MicroBatchPlanner(SharedPrefixPairs(), max_pairs=6).plan([rows], two_processes)
    assert seen == [[[6, 12, 1]]] and len(step.batches) == 5 and step.pairs == 8
    assert step.batches[0]["mean_chosen_length"] == (12 + 18) / 8
    assert sorted(row for batch in step.batches for row in batch["row"].tolist()) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("batches, lists, sizes", [
    (4, 4, [1, 1, 1, 1]), (5, 2, [2, 3]), (1, 3, [0, 0, 1]), (2, 4, [0, 1, 0, 1]), (7, 1, [7]),
])  # fmt: skip
def test_micro_batches_are_spread_over_the_batches_that_transformers_counts(batches, lists, sizes):
    step = MicroBatchPlanner(PaddedPairs(0), max_pairs=1).plan([rows_of(*[(2, 1, 1)] * batches)], alone)
    spread = in_lists(step.batches, lists)
    assert [len(batches) for batches in spread] == sizes
    assert [batch["row"].item() for batches in spread for batch in batches] == list(range(batches))


def test_an_evaluation_s_batch_is_cut_by_tokens_too():
    rows = rows_of(*ROWS)
    planner = MicroBatchPlanner(SharedPrefixPairs(), max_pairs=6, max_tokens=22)
    parts = planner.within_budget(rows, lambda count: count)
    assert sorted(sum(parts, [])) == [0, 1, 2, 3, 4, 5] and len(parts) == 3
    assert all(sum(planner.layout.tokens_of(rows[i]) for i in part) <= 22 for part in parts if len(part) > 1)
    assert len(planner.within_budget(rows, lambda count: 5)) == 5  # another process has as many
    assert MicroBatchPlanner(SharedPrefixPairs(), max_pairs=2).within_budget(rows, len) == [[0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("each", [False, True])
def test_gradients_are_summed_after_each_micro_batch_where_that_is_asked_for(each):
    """FSDP2 holds whole gradients within accelerate's `no_sync`, and its share outside of it."""
    entered = []

    @contextmanager
    def no_sync(model):
        entered.append(model)
        yield

    state = SimpleNamespace(plugin_kwargs={"sync_each_batch": each})
    accelerator = SimpleNamespace(sync_gradients=True, gradient_state=state, no_sync=no_sync)
    with MicroBatchLists._before_last(SimpleNamespace(accelerator=accelerator), "model"):
        assert accelerator.sync_gradients is False  # DeepSpeed takes no step yet
    assert accelerator.sync_gradients is True and entered == ([] if each else ["model"])


def test_columns_and_the_reference_of_the_rows_are_in_the_batch():
    rows = [
        {**row, "strength": [float(i), 2.0], COLUMNS[0]: [-1.0] * len(row["chosen_ids"]), COLUMNS[1]: [-2.0]}
        for i, row in enumerate(rows_of((2, 3, 1), (2, 1, 1)))
    ]
    batch = MicroBatchPlanner(SharedPrefixPairs(), max_pairs=2, columns=("strength",)).collate(rows)
    assert batch["strength"].tolist() == [[0.0, 2.0], [1.0, 2.0]]
    assert batch["ref_logps"].tolist() == [[-1, -1, -1], [-1, 0, 0], [-2, 0, 0], [-2, 0, 0]]
    assert torch.equal(cached_tokens(batch).mask, batch["ref_logps"] != 0)


# ---- data ------------------------------------------------------------------------------------------------------------


def test_datasets_get_the_columns_that_are_asked_for_and_no_others():
    def further(dataset, name):
        assert name == "train"
        return dataset.add_column("strength", [float(row) for row in dataset["row"]])

    raw = toy_pairs(6).add_column("margin", [0.5] * 6).add_column("weather", ["fine"] * 6)
    data = PairData(toy.tokenizer(), 32, 0.0, ("strength",), optional=("margin", "chosen_prob"), further=further)
    found = data.prepare(raw, "train")
    assert found.column_names == ["prompt_ids", "chosen_ids", "rejected_ids", "row", "strength", "margin"]
    assert found["strength"][:] == [0, 1, 2, 3, 4, 5]
    again = PairData(toy.tokenizer(), 32, 0.0).prepare(found.remove_columns("row"), "train")  # tokenised already
    assert again.column_names == ["prompt_ids", "chosen_ids", "rejected_ids", "row"] and again["row"][:] == [*range(6)]


def test_long_columns_are_read_chunk_by_chunk():
    """One array of a `list` column cannot hold more than 2^31 values; several can."""
    import pyarrow as pa

    chunks = [pa.array([[1, 2], [3]], pa.list_(pa.int64())), pa.array([[4]], pa.list_(pa.int64()))]
    lengths, values = flat_column(Dataset(pa.table({"ids": pa.chunked_array(chunks)})), "ids")
    assert lengths.tolist() == [2, 1, 1] and values.tolist() == [1, 2, 3, 4]
    large = Dataset.from_dict({"row": [0, 1]}).add_column("ids", list_column(np.arange(3.0), np.array([1, 2])))
    lengths, values = flat_column(large, "ids")
    assert lengths.tolist() == [1, 2] and values.tolist() == [0, 1, 2]


def test_beginnings_of_rows_are_those_of_a_loop(monkeypatch):
    monkeypatch.setattr("align.trainers.pairs.data.AT_ONCE", 3)
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 5, 8)
    values, rows = np.arange(lengths.sum()), generator.permutation(8)
    kept = np.minimum(lengths[rows], generator.integers(1, 4, 8))
    lists = np.split(values, np.cumsum(lengths)[:-1])
    wanted = [lists[row][:count] for row, count in zip(rows, kept, strict=True)]
    assert np.array_equal(beginnings(lengths, values, rows, kept), np.concatenate(wanted))
    assert len(beginnings(lengths, values, rows[:0], kept[:0])) == 0


def test_tokenised_rows_are_checked():
    data = PairData(toy.tokenizer(), 32, 0.0)
    rows = {"prompt_ids": [[3], [3]], "chosen_ids": [[4], [5]], "rejected_ids": [[5], [6]]}
    with pytest.raises(DataError, match=r"empty chosen_ids: rows \[1\]"):
        data.prepare(Dataset.from_dict({**rows, "chosen_ids": [[4], []]}), "train")
    with pytest.raises(DataError, match="tokenised pairs, row 1: .*chosen_prob"):
        data.prepare(Dataset.from_dict({**rows, "chosen_prob": [0.5, 1.5]}), "train")


# ---- metrics and evaluation ------------------------------------------------------------------------------------------


def test_means_are_read_once_and_weighted_by_pairs():
    means, found = BatchMeans(), []
    means.add({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([True, False])})
    means.add({"a": torch.tensor([4.0], requires_grad=True)})
    means.flush(lambda *entry: found.append(entry))
    assert found == [("a", 1.5, 2), ("b", 0.5, 2), ("a", 4.0, 1)]
    means.flush(lambda *entry: found.append(entry))
    assert len(found) == 3


def test_an_evaluation_has_means_over_its_pairs_a_table_and_a_figure():
    evaluator = PairEvaluator()
    first = {"loss": torch.tensor([1.0, 2.0]), "rewards/accuracies": torch.tensor([True, False])}
    tables = [evaluator.columns(first), evaluator.columns({name: values[:1] for name, values in first.items()})]
    assert evaluator.means(torch.cat(tables).numpy()) == pytest.approx({"loss": 4 / 3, "rewards/accuracies": 2 / 3})
    assert evaluator.values["loss"].tolist() == [1.0, 2.0, 1.0]
    rewards = np.array([0.5, 1.0]), np.array([0.25, -1.0])
    rows = rows_of((1, 1, 1), (1, 2, 1))
    columns, table = pairs_table(rows[1:], lambda ids: f"{len(ids)} tokens", *rewards, name="score", step=7)
    assert columns == ["step", "prompt", "chosen", "rejected", "score chosen", "score rejected"]
    assert table == [[7, "1 tokens", "2 tokens", "1 tokens", 0.5, 0.25]]
    figure = rewards_figure(*rewards, name="score", step=7)
    assert [axes.get_xlabel() for axes in figure.axes] == ["score", "score of chosen - score of rejected"]


def test_losses_come_with_their_rewards():
    losses = torch.tensor([0.3, 0.1], requires_grad=True)
    found = PairLosses(losses, torch.tensor([1.0, 2.0]), torch.tensor([0.5, 3.0]), {"kl": torch.tensor([4.0, 5.0])})
    values = found.values()
    assert list(values)[0] == "loss" and not values["loss"].requires_grad
    assert values["rewards/margins"].tolist() == [0.5, -1.0] and values["rewards/accuracies"].tolist() == [True, False]
    found.metrics["rewards/margins"] = torch.zeros(2)  # a method that knows better
    assert found.values()["rewards/margins"].tolist() == [0.0, 0.0]


def test_losses_that_are_not_finite_are_named_by_their_rows():
    check_finite(torch.tensor([7, 8]), torch.tensor([1.0, -1.0]), "step 3")
    with pytest.raises(TrainingError, match=r"step 3: the loss is not finite on rows \[8, 9\]"):
        check_finite(torch.tensor([7, 8, 9]), torch.tensor([1.0, torch.nan, torch.inf]), "step 3")


# ---- reference -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenised():
    return PairData(toy.tokenizer(), 32, 0.0).prepare(toy_pairs(7), "train")


def every_logp(model, dataset, pairs_at_once, shards, **options):
    """Through the same function as a trainer's pass over its data, in padded micro-batches."""
    planner, reference = MicroBatchPlanner(PaddedPairs(0), max_pairs=pairs_at_once), Reference(model, adapter_off=False)

    def logps_of(rows):
        return live_tokens(reference, planner.collate(rows), chunk_size=None, autocast=nullcontext).logps

    settings = {"at_once": 4, "rank": 0, "world": 1, "progress": tqdm(disable=True), "shards": shards, **options}
    compute_logps(dataset, planner.cut, logps_of, **settings)
    found = shards.read(0, len(dataset))
    assert list(found) == list(range(len(dataset)))
    return tuple(np.concatenate(side) for side in zip(*found.values(), strict=True))


def test_a_pass_over_a_dataset_has_the_log_probs_of_every_row_in_its_place(tokenised, tmp_path):
    model = tiny_model(toy.tokenizer()).eval()
    chosen, rejected = every_logp(model, tokenised, 3, ReferenceShards(tmp_path, 0, 7))
    assert len(chosen) == sum(map(len, tokenised["chosen_ids"])) and len(rejected) != 0
    first = 0
    for row in tokenised:
        with torch.no_grad():
            alone_logps = pair_tokens(model, PaddedPairs(0)([row])).logps[0, : len(row["chosen_ids"])]
        own = torch.from_numpy(chosen[first : first + len(row["chosen_ids"])])
        torch.testing.assert_close(own, alone_logps, rtol=1e-5, atol=1e-5)
        first += len(row["chosen_ids"])


def test_the_cache_computes_once_per_dataset_reference_and_precision(tokenised, tmp_path):
    computed = []

    def compute(shards):
        computed.append(1)
        return every_logp(tiny_model(toy.tokenizer()), tokenised, 3, shards)

    def added(weights="w", precision="no float32", dataset=tokenised):
        cache = ReferenceCache(tmp_path, weights, precision)
        found = cache.add_to(dataset, "train", compute)
        assert set(cache.marks) == {"train"}
        return found

    first, second = added(), added()
    assert len(computed) == 1 and first[0] == second[0]
    assert [len(row) for row in first[COLUMNS[0]]] == [len(row) for row in tokenised["chosen_ids"]]
    added(weights="other")
    added(precision="bf16 float32")
    assert len(computed) == 3 and len(list(tmp_path.glob("train-*.arrow"))) == 3


def test_a_row_for_which_the_disk_has_room_in_part_is_an_error(tmp_path):
    """The system writes what there is room for and says no error of it."""
    shards, row = ReferenceShards(tmp_path, 0, 7), np.zeros(3, np.float32)
    shards.append(0, row, row)
    whole = shards._file
    shards._file = SimpleNamespace(tell=whole.tell, write=lambda record: whole.write(record[:-1]))
    with pytest.raises(TrainingError, match="cannot be written: No space left"):
        shards.append(1, row, row)
    whole.close()
    assert ReferenceShards(tmp_path, 0, 7).find().tolist() == [True] + 6 * [False]


def test_what_a_killed_run_had_computed_is_not_computed_again(tokenised, tmp_path):
    """By itself or by another run on the folder, whatever is torn or damaged in its shard."""
    model, whole, passes = tiny_model(toy.tokenizer()), ReferenceShards(tmp_path / "whole", 0, 7), []
    expected = every_logp(model, tokenised, 3, whole)
    (file,) = whole.folder.iterdir()
    data, folder = file.read_bytes(), tmp_path / "train-1.shards"
    assert whole.find().all()
    folder.mkdir()

    class Counted(ReferenceShards):
        def append(self, row, chosen, rejected):
            passes.append(row)
            super().append(row, chosen, rejected)

    size = len(data) // 7
    for left, damage in ((data[: 4 * size], None), (data, 3 * size), (b"", None), (data[:10], None), (data, None)):
        for old in folder.iterdir():
            old.unlink()
        torn = bytearray(left)
        if damage is not None:
            torn[damage] ^= 8
        (folder / "0-a.shard").write_bytes(torn)
        kept, shards = set(np.flatnonzero(ReferenceShards(folder, 0, 7).find())), Counted(folder, 0, 7)
        passes.clear()
        found = every_logp(model, tokenised, 3, shards)
        assert set(passes) == set(range(7)) - kept and len(passes) == 7 - len(kept)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
        assert ReferenceShards(folder, 0, 7).find().all()  # for the next one
        if left is data:
            assert len(kept) == 7 if damage is None else 0 < len(kept) < 7


def logps_like(lengths) -> list:
    """Of each row two arrays, the second one longer by one."""
    return [
        tuple(np.arange(n, dtype=np.float32) + 1000 * i for n in (length, length + 1))
        for i, length in enumerate(lengths)
    ]


def test_several_runs_may_write_one_file_of_the_cache_at_a_time(tmp_path):
    path, rows = tmp_path / "shared" / "train-1.arrow", logps_like(range(1, 400))
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda _: reference_file.write(path, [rows[:100], rows[100:]]), range(12)))
    assert [file.name for file in path.parent.iterdir()] == ["train-1.arrow"]
    stored = Dataset.from_file(str(path))
    assert [(row[COLUMNS[0]], row[COLUMNS[1]]) for row in stored] == [(a.tolist(), b.tolist()) for a, b in rows]


def test_a_flipped_bit_and_a_cut_file_are_seen(tmp_path):
    path, lengths = tmp_path / "train-1.arrow", np.arange(1, 60)
    rows = logps_like(lengths)
    reference_file.write(path, [rows[:20], rows[20:]])
    reference_file.check(path, [lengths, lengths + 1])
    for other in ([lengths, lengths], [lengths[:-1], lengths[:-1] + 1], [lengths[::-1], lengths[::-1] + 1]):
        with pytest.raises(TrainingError, match="delete it"):
            reference_file.check(path, other)
    whole = path.read_bytes()
    draw = np.random.default_rng(0)
    harmless = 0
    for _ in range(300):
        harmed = bytearray(whole)
        if draw.random() < 0.3:
            harmed = harmed[: draw.integers(len(whole) - 16)]
        else:
            harmed[draw.integers(len(whole))] ^= 1 << int(draw.integers(8))
        path.write_bytes(harmed)
        try:
            reference_file.check(path, [lengths, lengths + 1])
        except TrainingError:
            continue
        harmless += 1  # padding, or a flag that nothing looks at: what is read is what was written
        stored = Dataset.from_file(str(path))
        assert [(row[COLUMNS[0]], row[COLUMNS[1]]) for row in stored] == [(a.tolist(), b.tolist()) for a, b in rows]
    assert harmless < 60, harmless


def test_which_model_is_the_reference():
    model, other = tiny_model(toy.tokenizer()), tiny_model(toy.tokenizer(), seed=1)
    assert make_reference(model, None, for_one_pass=True).model is model
    copied = make_reference(model, None, for_one_pass=False).model
    assert copied is not model and not any(p.requires_grad for p in copied.parameters())
    for once in (True, False):
        assert make_reference(model, other, for_one_pass=once).model is other
