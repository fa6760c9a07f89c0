import pytest
import torch

from align.data import PairCollator, SharedPrefixCollator
from align.data.batching import packed_batches
from align.data.shared_prefix import common_prefix
from align.modeling.pairs import at_completions, completions

ROWS = [
    {"prompt_ids": [10, 11, 12], "chosen_ids": [20, 21, 1], "rejected_ids": [30, 1], "margin": 0.5, "row": 7},
    {"prompt_ids": [13], "chosen_ids": [22, 23, 24, 1], "rejected_ids": [22, 23, 31], "margin": 2, "row": 9},
    {"prompt_ids": [14, 15], "chosen_ids": [25, 26], "rejected_ids": [25], "margin": 0, "row": 11},
]


def test_one_row_by_hand():
    batch = SharedPrefixCollator()(ROWS)
    assert batch["input_ids"].tolist() == [
        [10, 11, 12, 20, 21, 1, 30, 1] + [13, 22, 23, 24, 1, 31] + [14, 15, 25, 26]
    ]  # fmt: skip
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 3, 4] + [0, 1, 2, 3, 4, 3] + [0, 1, 2, 3]]
    assert batch["attention_mask"].tolist() == [[[[3, 3, 2], [3, 2, 1], [3, 1, 0]]]]
    assert batch["completion_ids"].tolist() == [
        [20, 21, 1, 0], [22, 23, 24, 1], [25, 26, 0, 0], [30, 1, 0, 0], [22, 23, 31, 0], [25, 0, 0, 0],
    ]  # fmt: skip
    assert batch["completion_sources"].tolist() == [
        [2, 3, 4, 0], [8, 9, 10, 11], [15, 16, 0, 0], [2, 6, 0, 0], [8, 9, 10, 0], [15, 0, 0, 0],
    ]  # fmt: skip
    assert batch["completion_mask"].sum(-1).tolist() == [3, 4, 2, 2, 3, 1]
    assert batch["margin"].tolist() == [0.5, 2, 0] and batch["row"].tolist() == [7, 9, 11]


def test_sources_hold_what_comes_before_as_in_padded_batches():
    padded, shared = PairCollator(0)(ROWS), SharedPrefixCollator()(ROWS)
    for batch in (padded, shared):
        places = completions(batch)
        assert torch.equal(places.ids * places.mask, shared["completion_ids"])
    before = [at_completions(batch["input_ids"], completions(batch)) for batch in (padded, shared)]
    assert torch.equal(*before)
    positions = shared["position_ids"], torch.arange(padded["input_ids"].shape[1]).expand_as(padded["input_ids"])
    before = [at_completions(p, completions(b)) for p, b in zip(positions, (shared, padded), strict=True)]
    assert torch.equal(*before)


@pytest.mark.parametrize(
    ("first", "second", "count"), [([1, 2], [1, 3], 1), ([1], [1, 2], 1), ([1], [2], 0), ([], [1], 0)]
)
def test_common_prefix(first, second, count):
    assert common_prefix(first, second) == common_prefix(second, first) == count


def test_tokens_of_a_pair():
    assert [SharedPrefixCollator().tokens_of(row) for row in ROWS] == [8, 6, 4]
    assert SharedPrefixCollator()(ROWS)["input_ids"].numel() == 18


def test_packed_batches():
    lengths = [5, 3, 9, 2, 4, 12, 1]
    batches = packed_batches(lengths, 10)
    assert batches == [[5], [2, 6], [0, 4], [1, 3]]
    assert packed_batches(lengths, 100) == [list(range(7))] and packed_batches([], 10) == []
    assert all(len(batch) <= 2 for batch in packed_batches(lengths, 100, max_rows=2))
    assert sorted(i for batch in packed_batches(lengths, 4, max_rows=2) for i in batch) == list(range(7))
