"""Batches in which the two completions of a pair share their prompt, and no token is padding."""

from dataclasses import dataclass
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from align.data.collate import per_pair


@dataclass
class SharedPrefixCollator:
    """Rows of `tokenize_pairs` to one row that holds every pair: shared prefix, rest of chosen, rest of rejected.

    The shared prefix is the prompt and what the two completions begin with in common. What a causal model computes
    for it is the same in both sequences, so log-probs are those of `PairCollator`'s batches; `pair_tokens` takes both.

    input_ids, position_ids: [1, N], N the tokens of all pairs; both rests count on from the end of their prefix.
    attention_mask: [1, 1, B, 3], the lengths of prefix, rest of chosen, rest of rejected (`modeling.shared_prefix`).
    completion_ids, completion_mask, completion_sources: [2B, L], `modeling.pairs.Completions`.
    With these columns in the data: margin and chosen_prob [B] float32, row [B].
    """

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Tensor]:
        ids: list[int] = []
        positions: list[int] = []
        lengths: list[list[int]] = []
        chosen: list[list[int]] = []
        rejected: list[list[int]] = []
        for row in features:
            prompt, both = row["prompt_ids"], (row["chosen_ids"], row["rejected_ids"])
            start, shared = len(ids), common_prefix(*both)
            prefix = len(prompt) + shared
            rests = [completion[shared:] for completion in both]
            ids += [*prompt, *both[0][:shared], *rests[0], *rests[1]]
            positions += [*range(prefix), *(prefix + i for rest in rests for i in range(len(rest)))]
            lengths.append([prefix, len(rests[0]), len(rests[1])])
            # a token is predicted at the one before it; for the first of a rest that is the end of the prefix
            common = range(start + len(prompt) - 1, start + prefix)
            for sources, end, rest in ((chosen, start, rests[0]), (rejected, start + len(rests[0]), rests[1])):
                own = range(end + prefix, end + prefix + len(rest) - 1)
                sources.append([*common, *own][: shared + len(rest)])
        targets = [row[name] for name in ("chosen_ids", "rejected_ids") for row in features]
        sources = chosen + rejected
        if "chosen_mask" in features[0]:  # of a token that is not trained no log-prob is asked for
            masks = [row[name] for name in ("chosen_mask", "rejected_mask") for row in features]
            targets = [list(compress(*both)) for both in zip(targets, masks, strict=True)]
            sources = [list(compress(*both)) for both in zip(sources, masks, strict=True)]
        padded_sources, mask = _right_pad(sources)
        completions, _ = _right_pad(targets)
        return {
            "input_ids": torch.tensor([ids]),
            "position_ids": torch.tensor([positions]),
            "attention_mask": torch.tensor([[lengths]]),
            "completion_ids": completions,
            "completion_mask": mask,
            "completion_sources": padded_sources,
            **per_pair(features),
        }

    def tokens_of(self, row: dict[str, Any]) -> int:
        """Tokens that a pair takes in a batch."""
        chosen, rejected = row["chosen_ids"], row["rejected_ids"]
        return len(row["prompt_ids"]) + len(chosen) + len(rejected) - common_prefix(chosen, rejected)


def common_prefix(first: list[int], second: list[int]) -> int:
    """Tokens that both begin with."""
    for count, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return count
    return min(len(first), len(second))


def _right_pad(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(row) for row in rows])
    padded = torch.nn.utils.rnn.pad_sequence([torch.as_tensor(row, dtype=torch.long) for row in rows], batch_first=True)
    return padded, torch.arange(padded.shape[1]) < lengths[:, None]
