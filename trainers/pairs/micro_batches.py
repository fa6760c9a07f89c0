"""How the pairs of one optimiser step are cut into micro-batches, and these made into tensors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from align.data.batching import length_batches, packed_batches
from align.data.collate import PairCollator
from align.data.shared_prefix import SharedPrefixCollator
from align.trainers.pairs.reference_file import COLUMNS as REF_COLUMNS

Rows = list[dict]


class PairRows:
    """The rows of one batch as they are in the dataset; not a list, through whose tokens accelerate would recurse."""

    def __init__(self, rows: Rows):
        self.rows = rows


# ---- layouts ---------------------------------------------------------------------------------------------------------


class PaddedPairs(PairCollator):
    """Batches in which every sequence is padded to the longest: chosen and rejected in rows of their own."""

    def tokens_of(self, row: dict) -> int:
        """Tokens that a pair takes in a batch, without the padding to other pairs."""
        return 2 * (len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])))

    def cut(self, rows: Rows, max_pairs: int | None, max_tokens: int | None) -> list[Rows]:
        """Rows in micro-batches of similar length, the longest first: at most `max_pairs` pairs and `max_tokens`
        tokens, padding counted; a pair that is longer than that is a micro-batch of its own."""
        return _cut(rows, length_batches, [self.tokens_of(row) for row in rows], max_pairs, max_tokens)


class SharedPrefixPairs(SharedPrefixCollator):
    """Batches of one row, in which the completions of a pair share their prompt and nothing is padded."""

    def cut(self, rows: Rows, max_pairs: int | None, max_tokens: int | None) -> list[Rows]:
        """Rows in micro-batches of at most `max_pairs` pairs and `max_tokens` tokens; a pair that is longer than that
        is a micro-batch of its own."""
        return _cut(rows, packed_batches, [self.tokens_of(row) for row in rows], max_pairs, max_tokens)


def _cut(
    rows: Rows,
    batches_of: Callable[[Sequence[int], int, int | None], list[list[int]]],
    tokens: list[int],
    max_pairs: int | None,
    max_tokens: int | None,
) -> list[Rows]:
    limit = max_tokens or len(rows) * sum(tokens)
    return [[rows[i] for i in batch] for batch in batches_of(tokens, limit, max_pairs)]


# ---- a step ----------------------------------------------------------------------------------------------------------


@dataclass
class MicroBatches:
    """The micro-batches of one optimiser step on this process, and what the step holds on all of them.

    pairs: their number, a scalar.
    """

    batches: list[dict[str, Tensor]]
    pairs: Tensor


@dataclass
class MicroBatchPlanner:
    """Pairs of an optimiser step -> its micro-batches.

    layout: of the tokens.
    max_pairs: of a micro-batch where `max_tokens` is None; max_tokens: its tokens, padding counted.
    columns: of the rows, numeric, which become float32 tensors [B, ...].
    as_given: the batches of the data loader are the micro-batches, as a loss across pairs needs them.
    """

    layout: PaddedPairs | SharedPrefixPairs
    max_pairs: int
    max_tokens: int | None = None
    columns: tuple[str, ...] = ()
    as_given: bool = False

    def plan(self, groups: list[Rows], gather: Callable[[Tensor], Tensor]) -> MicroBatches:
        """groups: the rows of the step on this process, in the batches of the data loader. gather: [1, n] of this
        process -> [processes, n].

        Every micro-batch has `mean_chosen_length`, the mean number of tokens of the chosen completions of the step.
        """
        rows = [row for group in groups for row in group]
        batches = groups if self.as_given else self.cut(rows)
        pairs, tokens, counts = gather(torch.tensor([[len(rows), chosen_tokens(rows), len(batches)]])).unbind(-1)
        if not self.as_given:
            batches = split_to(batches, int(counts.max()))
        collated = [self.collate(batch) for batch in batches]
        for batch in collated:
            batch["mean_chosen_length"] = tokens.sum() / pairs.sum()
        return MicroBatches(collated, pairs.sum())

    def cut(self, rows: Rows, max_pairs: int | None = None) -> list[Rows]:
        """Rows in micro-batches of `max_tokens` tokens, or without it of `max_pairs` pairs (None: of the planner's)."""
        return self.layout.cut(rows, None if self.max_tokens else max_pairs or self.max_pairs, self.max_tokens)

    def within_budget(self, rows: Rows, most: Callable[[int], int]) -> list[list[int]]:
        """Indices of the rows of an evaluation's batch, cut so that no part has more than `max_tokens` tokens; as they
        are where there is no such bound. most: a count of this process -> the largest of all processes."""
        if self.max_tokens is None or self.as_given:
            return [list(range(len(rows)))]
        parts = self.cut([{**row, "index": i} for i, row in enumerate(rows)])
        return [[row["index"] for row in part] for part in split_to(parts, most(len(parts)))]

    def collate(self, rows: Rows) -> dict[str, Tensor]:
        """The layout's tensors, those of the columns, and `ref_logps` where the rows hold the reference's log-probs."""
        batch = self.layout(rows)
        for column in self.columns:
            batch[column] = torch.tensor([row[column] for row in rows], dtype=torch.float32)
        if REF_COLUMNS[0] in rows[0]:
            batch["ref_logps"] = right_pad_values([row[column] for column in REF_COLUMNS for row in rows])
        return batch


def split_to(batches: list[Rows], count: int) -> list[Rows]:
    """The same rows in `count` micro-batches, or as many as there are rows: the largest are halved.

    Processes that gather weights in their forward pass (FSDP, ZeRO-3) must all run the same number.
    """
    batches = list(batches)
    while len(batches) < count and max(map(len, batches)) > 1:
        largest = max(range(len(batches)), key=lambda i: len(batches[i]))
        whole = batches[largest]
        batches[largest : largest + 1] = [whole[: len(whole) // 2], whole[len(whole) // 2 :]]
    return batches


def chosen_tokens(rows: Rows) -> int:
    return sum(sum(row["chosen_mask"]) if "chosen_mask" in row else len(row["chosen_ids"]) for row in rows)


def right_pad_values(rows: list[list[float]]) -> Tensor:
    """[B, L] float32, 0 after a row's end."""
    return pad_sequence([torch.tensor(row, dtype=torch.float32) for row in rows], batch_first=True)
