"""How the pairs of one optimiser step are cut into micro-batches."""

from collections.abc import Sequence

from align.data.batching import length_batches


class PairRows:
    """The rows of one batch as they are in the dataset; no list, or accelerate would walk through every token."""

    def __init__(self, rows: list[dict]):
        self.rows = rows


def similar_lengths(
    rows: list[dict], tokens: Sequence[int], *, max_pairs: int | None, max_tokens: int | None
) -> list[list[dict]]:
    """Rows in micro-batches of similar length, the longest first; tokens: what each row takes in a batch.

    A micro-batch has at most `max_pairs` pairs and `max_tokens` tokens, padding counted; a pair that is longer than
    that is a micro-batch of its own.
    """
    limit = max_tokens or sum(tokens) * len(rows)
    return [[rows[i] for i in batch] for batch in length_batches(tokens, limit, max_pairs)]


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
