"""The made-up pairs by which models are tried for shared prefixes."""

from align.data.shared_prefix import common_prefix
from align.modeling.prefix_support import _other, _pairs


def test_other_tokens_leave_the_layout():
    """With some vocabularies (343) the replaced answers began alike for longer, and a model was taken to leak."""
    for vocabulary in (*range(20, 1000), 32001, 50257, 128257):
        pairs = _pairs(vocabulary)
        for shift in (0, 7, 18):
            changed = [_other(row, "chosen_ids", shift) for row in pairs]
            assert [common_prefix(row["chosen_ids"], row["rejected_ids"]) for row in changed] == [1, 0], vocabulary
