import torch

from align.data import CompletionCollator, PairCollator, left_pad, right_pad

PAD = 0


def test_padding_sides_and_masks_from_lengths():
    ids, mask = right_pad([[5, PAD, 7], [8]], PAD)
    assert ids.tolist() == [[5, PAD, 7], [8, PAD, PAD]] and mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    ids, mask = left_pad([[5, PAD, 7], [8]], PAD)
    assert ids.tolist() == [[5, PAD, 7], [PAD, PAD, 8]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert ids.dtype == mask.dtype == torch.int64


def test_a_pair_batch_has_the_chosen_first():
    rows = [
        {
            "prompt_ids": [1, 2],
            "chosen_ids": [3, PAD],
            "rejected_ids": [4],
            "margin": 0.5,
            "chosen_prob": 0.75,
            "row": 10,
        },
        {"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [7, 8, 9], "margin": 2, "chosen_prob": 1, "row": 12},
    ]
    batch = PairCollator(PAD)(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 3, PAD], [5, 6, PAD, PAD], [1, 2, 4, PAD], [5, 7, 8, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["completion_mask"].tolist() == [[0, 0, 1, 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 1, 1, 1]]
    assert batch["chosen_prob"].tolist() == [0.75, 1.0]
    assert batch["margin"].tolist() == [0.5, 2.0] and batch["margin"].dtype == torch.float32
    assert batch["row"].tolist() == [10, 12]


def test_pairs_without_margin():
    rows = [{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}]
    assert set(PairCollator(PAD)(rows)) == {"input_ids", "attention_mask", "completion_mask"}


def test_labels_are_the_trained_tokens():
    rows = [
        {"input_ids": [1, 2, PAD], "completion_mask": [0, 1, 1], "row": 0},
        {"input_ids": [4, 5], "completion_mask": [0, 1], "row": 1},
    ]
    batch = CompletionCollator(PAD)(rows)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert batch["labels"].tolist() == [[-100, 2, PAD], [-100, 5, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
