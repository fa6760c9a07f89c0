"""The worlds that the benchmarks share."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from worlds.on_policy import even_words  # noqa: E402


def test_a_random_model_writes_special_tokens_too():
    """The reward sees them, and they are no even words."""
    assert even_words(["w2 w3 <pad> w4", "", "<pad>"]) == [0.5, 0.0, 0.0]
