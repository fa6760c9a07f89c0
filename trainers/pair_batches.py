"""How the pairs of one optimiser step are cut into micro-batches, in either layout."""

from align.data.batching import length_batches
from align.data.collate import PairCollator
from align.data.shared_prefix import SharedPrefixCollator, common_prefix


class PairRows:
    """The rows of one batch as they are in the dataset; no list, or accelerate would walk through every token."""

    def __init__(self, rows: list[dict]):
        self.rows = rows


class PaddedPairs(PairCollator):
    """Batches in which every sequence is padded to the longest: chosen and rejected in rows of their own."""

    def tokens(self, row: dict) -> int:
        """Tokens that a pair takes in a batch, without the padding to other pairs."""
        return 2 * (len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])))

    def cut(self, rows: list[dict], max_pairs: int | None, max_tokens: int | None) -> list[list[dict]]:
        """Rows in micro-batches of similar length, the longest first: at most `max_pairs` pairs and `max_tokens`
        tokens, padding counted; a pair that is longer than that is a micro-batch of its own."""
        tokens = [self.tokens(row) for row in rows]
        limit = max_tokens or sum(tokens) * len(rows)
        return [[rows[i] for i in batch] for batch in length_batches(tokens, limit, max_pairs)]


class SharedPrefixPairs(SharedPrefixCollator):
    """Batches of one row, in which the completions of a pair share their prompt and nothing is padded."""

    def tokens(self, row: dict) -> int:
        """Tokens that a pair takes in a batch."""
        chosen, rejected = row["chosen_ids"], row["rejected_ids"]
        return len(row["prompt_ids"]) + len(chosen) + len(rejected) - common_prefix(chosen, rejected)

    def cut(self, rows: list[dict], max_pairs: int | None, max_tokens: int | None) -> list[list[dict]]:
        """Rows in micro-batches, in their order: at most `max_pairs` pairs and `max_tokens` tokens; a pair that is
        longer than that is a micro-batch of its own."""
        batches, taken = [], 0
        for row in rows:
            tokens = self.tokens(row)
            full = batches and (len(batches[-1]) == max_pairs or (max_tokens and taken + tokens > max_tokens))
            if full or not batches:
                batches.append([])
                taken = 0
            batches[-1].append(row)
            taken += tokens
        return batches


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
