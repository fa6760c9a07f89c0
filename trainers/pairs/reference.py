"""The reference of a run on pairs: how it is made, and its log-probs of one batch and of a whole dataset."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from tqdm.auto import tqdm

from align.data.tokenized import IDS, MASKS
from align.distributed.ranks import shared
from align.modeling.load import Reference, freeze_copy, load_policy, reference_of
from align.modeling.logprobs import language_model
from align.modeling.pairs import PairTokens, completions, pair_tokens
from align.trainers.pairs.reference_shards import ReferenceShards


def load_reference(
    ref_model: str | nn.Module | None, policy: nn.Module, dtype: torch.dtype | None = None
) -> nn.Module | None:
    """The reference that is named, loaded as the policy was, or in another dtype; None where none is."""
    if not isinstance(ref_model, str):
        return ref_model
    core = language_model(policy)
    dtype, attention = core.dtype if dtype is None else dtype, core.config._attn_implementation
    return load_policy(ref_model, dtype=dtype, attn_implementation=attention, sharded=True)


def make_reference(
    policy: nn.Module, ref_model: nn.Module | None, *, for_one_pass: bool, dtype: torch.dtype | None = None
) -> Reference:
    """The reference of a policy that has not been trained yet: `ref_model`, the policy with its adapter off, or a copy
    of it. for_one_pass: it is used before training only, so the policy itself is used and no copy is made. dtype: of
    its weights, where it is a model of its own; None: as they are."""
    if dtype is not None:
        return Reference(freeze_copy(policy if ref_model is None else ref_model, dtype), adapter_off=False)
    if for_one_pass and ref_model is None:
        return Reference(policy, adapter_off=isinstance(policy, PeftModel))
    return reference_of(policy, ref_model)


def live_tokens(
    reference: Reference,
    batch: dict[str, Tensor],
    *,
    chunk_size: int | None,
    autocast: Callable[[], AbstractContextManager],
) -> PairTokens:
    """The completion tokens of a batch under the reference, without gradient."""
    with reference.active() as model, autocast():
        return pair_tokens(model, batch, chunk_size=chunk_size)


def cached_tokens(batch: dict[str, Tensor]) -> PairTokens:
    """The same from the log-probs that the batch holds."""
    return PairTokens(batch["ref_logps"], completions(batch).mask)


def compute_logps(
    dataset,
    cut: Callable[[list[dict]], list[list[dict]]],
    logps_of: Callable[[list[dict]], Tensor],
    *,
    at_once: int,
    rank: int,
    world: int,
    progress: tqdm,
    shards: ReferenceShards,
) -> None:
    """Log-probs of all tokens of chosen and of rejected, into the shards; the processes share the rows.

    Args:
        dataset: tokenised pairs.
        cut: rows -> micro-batches. logps_of: a micro-batch -> [2B, L], chosen rows and then rejected, left-aligned.
        at_once: rows that are read and cut together. progress: counts rows. shards: of rows that are computed already,
            by whomever, and for those of this process.
    """
    missing = shared(np.flatnonzero(~shards.find()) if rank == 0 else None)
    progress.update(len(dataset) - len(missing))
    for start in range(0, len(missing), at_once):
        numbers = missing[start : start + at_once].tolist()
        part = dataset.select(numbers).to_list()
        batches = cut([{**row, "number": number} for number, row in zip(numbers, part, strict=True)])
        # all processes run the same number of batches: sharded models gather weights in every one
        for first in range(0, len(batches), world):
            batch = batches[min(first + rank, len(batches) - 1)]
            logps = logps_of(batch).float().cpu().numpy()
            if first + rank >= len(batches):  # it is another process's too
                continue
            for row, *both in zip(batch, logps[: len(batch)], logps[len(batch) :], strict=True):
                lengths = [sum(row.get(mask) or [1] * len(row[ids])) for ids, mask in zip(IDS[1:], MASKS, strict=True)]
                shards.append(row["number"], *(v[:length] for v, length in zip(both, lengths, strict=True)))
        progress.update(len(part))
    shards.close()
