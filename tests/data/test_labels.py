"""Masks and labels of demonstrations that are tokenised: one for each token, or refused with the rows."""

import pytest
from datasets import Dataset, Features, List, Value

from align.data.labels import check_labels, label_problem
from align.errors import DataError

IDS = {"input_ids": [5, 3, 2]}


@pytest.mark.parametrize(
    "good, bad, problem",
    [
        ({"completion_mask": [0, 1, 1]}, {"completion_mask": [0, 1]}, "completion_mask must have one for each of"),
        ({"assistant_masks": [0, 1, 1]}, {"assistant_masks": None}, "assistant_masks must have one for each of"),
        ({"labels": [-100, 3, 2]}, {"labels": [3, 2]}, "labels must have one for each of"),
        ({"completion_mask": [0, 1, 1]}, {"completion_mask": [0, 2, 2]}, "completion_mask must hold 0 or 1"),
        ({"completion_mask": [0, 1, 1]}, {"completion_mask": [0, None, 1]}, "completion_mask must hold 0 or 1"),
        ({"labels": [-100, 3, 2]}, {"labels": [-100, -1, 2]}, "labels must hold tokens, and -100"),
        (
            {"completion_mask": [0, 1, 1], "labels": [5, 3, 2]},
            {"completion_mask": [0, 0, 1], "labels": [5, 3, 2]},
            "completion_mask is 0 where labels is not -100",
        ),
    ],
)
def test_what_does_not_fit_the_tokens_is_refused(good, bad, problem):
    rows = Dataset.from_list([{**IDS, **good}, {**IDS, **bad}, {**IDS, **good}])
    for part, number in ((rows, 1), (rows.select([2, 0, 1]), 2)):
        with pytest.raises(DataError, match=rf"^1 tokenised rows: {problem}.*: rows \[{number}\]"):
            check_labels(part)
        assert [label_problem(row) is None for row in part] == [n != number for n in range(3)]
    check_labels(rows.select([0, 2]))
    check_labels(rows.select([]))


def test_masks_may_be_true_and_false():
    kinds = Features({"input_ids": List(Value("int32")), "completion_mask": List(Value("bool"))})
    check_labels(Dataset.from_list([{**IDS, "completion_mask": [False, True, True]}], kinds))
