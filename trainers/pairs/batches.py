"""How the pairs of one optimiser step are cut into micro-batches, in either layout."""

from align.data.batching import length_batches, packed_batches
from align.data.collate import PairCollator
from align.data.shared_prefix import SharedPrefixCollator


class PairRows:
    """The rows of one batch as they are in the dataset; no list, or accelerate would walk through every token."""

    def __init__(self, rows: list[dict]):
        self.rows = rows


class PaddedPairs(PairCollator):
    """Batches in which every sequence is padded to the longest: chosen and rejected in rows of their own."""

    def tokens_of(self, row: dict) -> int:
        """Tokens that a pair takes in a batch, without the padding to other pairs."""
        return 2 * (len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])))

    def cut(self, rows: list[dict], max_pairs: int | None, max_tokens: int | None) -> list[list[dict]]:
        """Rows in micro-batches of similar length, the longest first: at most `max_pairs` pairs and `max_tokens`
        tokens, padding counted; a pair that is longer than that is a micro-batch of its own."""
        return _cut(rows, length_batches, [self.tokens_of(row) for row in rows], max_pairs, max_tokens)


class SharedPrefixPairs(SharedPrefixCollator):
    """Batches of one row, in which the completions of a pair share their prompt and nothing is padded."""

    def cut(self, rows: list[dict], max_pairs: int | None, max_tokens: int | None) -> list[list[dict]]:
        """Rows in micro-batches of at most `max_pairs` pairs and `max_tokens` tokens; a pair that is longer than that
        is a micro-batch of its own."""
        return _cut(rows, packed_batches, [self.tokens_of(row) for row in rows], max_pairs, max_tokens)


def _cut(rows: list[dict], batches_of, tokens: list[int], max_pairs, max_tokens) -> list[list[dict]]:
    limit = max_tokens or len(rows) * sum(tokens)
    return [[rows[i] for i in batch] for batch in batches_of(tokens, limit, max_pairs)]


def split_to(batches: list[list[dict]], count: int) -> list[list[dict]]:
    """The same rows in `count` micro-batches, or as many as there are rows: the largest are halved.

    Processes that gather weights in their forward pass (FSDP, ZeRO-3) wait for one another: they must make as many.
    """
    batches = list(batches)
    while len(batches) < count and max(map(len, batches)) > 1:
        largest = max(range(len(batches)), key=lambda i: len(batches[i]))
        whole = batches[largest]
        batches[largest : largest + 1] = [whole[: len(whole) // 2], whole[len(whole) // 2 :]]
    return batches
