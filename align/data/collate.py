"""Batches from token ids. Attention masks come from lengths, never from the pad token's id."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from align.data.labels import IGNORED

if TYPE_CHECKING:
    from datasets import Dataset

TOKENS = ("input_ids", "completion_mask", "assistant_masks", "labels")


def left_pad(ids: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """(input_ids [B, T], attention_mask [B, T]), both int64, each sequence at the right end of its row."""
    return _pad(ids, pad_id, left=True)


def right_pad(ids: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """(input_ids [B, T], attention_mask [B, T]), both int64, each sequence at the left end of its row."""
    return _pad(ids, pad_id, left=False)


def _pad(sequences: Sequence[Sequence[int]], pad_id: int, left: bool) -> tuple[Tensor, Tensor]:
    width = max(len(sequence) for sequence in sequences)
    input_ids = torch.full((len(sequences), width), pad_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for index, sequence in enumerate(sequences):
        span = slice(width - len(sequence), width) if left else slice(0, len(sequence))
        input_ids[index, span] = torch.as_tensor(sequence, dtype=torch.long)
        attention_mask[index, span] = 1
    return input_ids, attention_mask


@dataclass
class PairCollator:
    """Rows of `tokenize_pairs` to one right-padded batch, the chosen sequences first, then the rejected in their order.

    input_ids, attention_mask, completion_mask: [2B, T]; with the columns chosen_mask and rejected_mask the latter has
    what these have. With these columns in the data: margin and chosen_prob [B]
    float32, row [B].
    """

    pad_token_id: int

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Tensor]:
        completions = [row["chosen_ids"] for row in features] + [row["rejected_ids"] for row in features]
        prompts = [row["prompt_ids"] for row in features] * 2
        whole = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
        input_ids, attention_mask = right_pad(whole, self.pad_token_id)
        starts = torch.tensor([len(prompt) for prompt in prompts])[:, None]
        completion_mask = attention_mask * (torch.arange(input_ids.shape[1]) >= starts)
        if "chosen_mask" in features[0]:
            own = [row["chosen_mask"] for row in features] + [row["rejected_mask"] for row in features]
            trained = [[0] * len(prompt) + mask for prompt, mask in zip(prompts, own, strict=True)]
            completion_mask = completion_mask * right_pad(trained, 0)[0]
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "completion_mask": completion_mask}
        return batch | per_pair(features)


def per_pair(features: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The columns margin and chosen_prob [B] float32 and row [B], where the data has them."""
    dtypes = {"margin": torch.float32, "chosen_prob": torch.float32, "row": torch.int64}
    return {
        name: torch.tensor([row[name] for row in features], dtype=dtype)
        for name, dtype in dtypes.items()
        if name in features[0]
    }


@dataclass
class CompletionCollator:
    """Rows of `tokenize_completions` to one right-padded batch that a causal language model takes as it is.

    input_ids, attention_mask, labels: [B, T]; labels are -100 outside the completion mask.
    """

    pad_token_id: int

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Tensor]:
        input_ids, attention_mask = right_pad([row["input_ids"] for row in features], self.pad_token_id)
        trained, _ = right_pad([row["completion_mask"] for row in features], 0)
        labels = input_ids.masked_fill(trained == 0, IGNORED)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def labelled(row: dict) -> dict[str, list[int]]:
    """The labels of a tokenised row: its trained tokens."""
    ids = row["input_ids"]
    mask = row.get("completion_mask") or [1] * len(ids)
    return {"labels": [token if trained else IGNORED for token, trained in zip(ids, mask, strict=True)]}


def with_labels(dataset: "Dataset") -> "Dataset":
    """Tokenised rows with `labels` in the place of their `completion_mask`, many rows at once: a Python function per
    row, as TRL has it, takes minutes for a million. Rows as they are where there is no such mask, or labels already."""
    from datasets import Features, List, Value

    from align.data.limits import lengths_of

    names = set(dataset.column_names)
    if "completion_mask" not in names or {"labels", "assistant_masks"} & names:
        return dataset
    if not np.array_equal(lengths_of(dataset, "input_ids"), lengths_of(dataset, "completion_mask")):
        return dataset  # TRL's rule for masks of another length
    kept = {name: feature for name, feature in dataset.features.items() if name != "completion_mask"}
    return (
        dataset.with_format("arrow")
        .map(
            _labels_of,
            batched=True,
            remove_columns=["completion_mask"],
            features=Features({**kept, "labels": List(Value("int32"))}),
            desc="Labels",
        )
        .with_format(None)
    )


def _labels_of(batch: Any) -> Any:
    """An Arrow table of tokenised rows, with their labels."""
    import pyarrow as pa
    import pyarrow.compute as pc

    ids, mask = (batch[name].combine_chunks() for name in ("input_ids", "completion_mask"))
    labels = np.where(mask.flatten().to_numpy() == 1, ids.flatten().to_numpy(), IGNORED).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(pc.list_value_length(ids).to_numpy())]).astype(np.int32)
    kept = {name: batch[name] for name in batch.column_names if name != "completion_mask"}
    return pa.table({**kept, "labels": pa.ListArray.from_arrays(pa.array(offsets), pa.array(labels))})


def untrained_rows(dataset: "Dataset", limit: int | None) -> np.ndarray:
    """The numbers of tokenised rows without a trained token among their first `limit`, by their masks and
    `labels`, where they have them; the first token is predicted by none."""
    trains = np.ones(len(dataset), bool)
    for name, context in (("completion_mask", 0), ("assistant_masks", 0), ("labels", IGNORED)):
        if name in dataset.column_names:
            trains &= _has_another(dataset, name, context, limit)
    return np.flatnonzero(~trains)


def _has_another(dataset: "Dataset", name: str, context: int, limit: int | None) -> np.ndarray:
    """[rows], bool: whether a list has a value that is not `context`, from its second one to before `limit`; one that
    is missing counts."""
    import pyarrow.compute as pc

    from align.data.limits import parts_of

    found = [np.zeros(0, bool)]
    for _, lists in parts_of(dataset, name):
        lists = lists if limit is None else pc.list_slice(lists, 0, limit)
        lengths = pc.list_value_length(lists).fill_null(0).to_numpy()
        starts = (np.cumsum(lengths) - lengths)[lengths > 0]
        another = lists.flatten().cast("int32").fill_null(context).to_numpy() != context
        another[starts] = False
        has = lists.is_null().to_numpy(zero_copy_only=False)
        has[lengths > 0] = np.logical_or.reduceat(another, starts) if len(starts) else False
        found.append(has)
    return np.concatenate(found)


def cut_rows(dataset: "Dataset", limit: int) -> "Dataset":
    """Tokenised rows with at most `limit` tokens, many rows at once."""
    import pyarrow.compute as pc

    def cut(table: Any) -> Any:
        for place, name in enumerate(table.column_names):
            if name in TOKENS:
                table = table.set_column(place, table.schema.field(place), pc.list_slice(table[name], 0, limit))
        return table

    plain = dataset.with_format("arrow")
    return plain.map(cut, batched=True, features=dataset.features, desc="Cutting").with_format(None)
