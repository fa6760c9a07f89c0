"""Which sequences go through a model together, at most so many tokens at a time."""

from collections.abc import Sequence


def length_batches(lengths: Sequence[int], max_tokens: int, max_rows: int | None = None) -> list[list[int]]:
    """Row numbers in batches, longest rows first, so that what does not fit in memory fails at once.

    A batch has at most `max_tokens` tokens, padding counted, and at most `max_rows` rows; a row longer than
    `max_tokens` is a batch of its own. Every row is in exactly one batch. lengths: tokens of each row.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    batches, start = [], 0
    while start < len(order):
        rows = max(max_tokens // max(lengths[order[start]], 1), 1)
        rows = min(rows, max_rows or rows)
        batches.append(order[start : start + rows])
        start += rows
    return batches


def packed_batches(lengths: Sequence[int], max_tokens: int, max_rows: int | None = None) -> list[list[int]]:
    """Row numbers in batches for a layout without padding: a batch takes the sum of its rows' tokens.

    Each row, longest first, goes to the first batch that has room for it (at most `max_tokens` tokens and `max_rows`
    rows); a row longer than `max_tokens` is a batch of its own. The rows of a batch keep their order.
    """
    batches: list[list[int]] = []
    room: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        fits = (
            i for i, batch in enumerate(batches) if lengths[row] <= room[i] and len(batch) < (max_rows or len(lengths))
        )
        index = next(fits, len(batches))
        if index == len(batches):
            batches.append([])
            room.append(max_tokens)
        batches[index].append(row)
        room[index] -= lengths[row]
    return [sorted(batch) for batch in batches]
