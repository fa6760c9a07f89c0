"""Scores of sequence classifiers, read at the last real token."""

import inspect

import torch
from torch import Tensor

from align.modeling.logprobs import language_model
from align.modeling.score_head import head_name
from align.modeling.types import Model


def sequence_scores(model: Model, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """One score per sequence [B], float32 (or float64), differentiable. input_ids, attention_mask: [B, T].

    The last real token is found from the attention mask alone. transformers looks for the last token that is not the
    padding token instead, which skips the end token wherever the two are the same. Padding may be on either side: rows
    are moved to the left first, so the score does not depend on it. Encoders score with their own pooled output.
    """
    input_ids, attention_mask = to_right_padding(input_ids, attention_mask)
    last = attention_mask.sum(-1) - 1
    rows = torch.arange(len(last), device=last.device)
    return _scores_at(model, {"input_ids": input_ids, "attention_mask": attention_mask}, (rows, last))


def pair_scores(model: Model, batch: dict[str, Tensor]) -> Tensor:
    """Scores [2B] of a batch of pairs, chosen and then rejected, as `sequence_scores`.

    batch: of `PairCollator`, or of `SharedPrefixCollator` for a model that takes such rows
    (`prefix_support.enable_shared_scores`).
    """
    if "position_ids" not in batch:
        return sequence_scores(model, batch["input_ids"], batch["attention_mask"])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
    return _scores_at(model, inputs, (0, last_of_rests(batch["attention_mask"])))


def last_of_rests(table: Tensor) -> Tensor:
    """Where each sequence of a row with shared prefixes ends: [rests * groups], the first rest of every group first.

    table: [1, 1, groups, 1 + rests], of `modeling.shared_prefix`. Where a rest is empty, its sequence is the prefix.
    """
    lengths = table.view(-1, table.shape[-1])
    ends = lengths.flatten().cumsum(0).view_as(lengths) - 1
    return torch.where(lengths[:, 1:] > 0, ends[:, 1:], ends[:, :1]).T.flatten()


def _scores_at(model: Model, inputs: dict, last: tuple) -> Tensor:
    """The outputs of the head in a forward pass; of a head on every token those at `last` (rows, positions)."""
    core = language_model(model)
    kept = {}

    def keep_head_output(module, args, output):
        kept["scores"] = output

    def replace_output(module, args, output):
        scores = kept["scores"]
        if scores.dim() == 3:  # a head on every token: causal models
            scores = scores[last]
        kept["scores"] = output.logits = scores if scores.dtype == torch.float64 else scores.float()
        return output

    head = core.get_submodule(head_name(core).split(".")[0])
    # prepended: the wrappers' own hooks must see the tensor through which the gradient comes back
    hooks = [head.register_forward_hook(keep_head_output), core.register_forward_hook(replace_output, prepend=True)]
    no_cache = {"use_cache": False} if "use_cache" in inspect.signature(type(core).forward).parameters else {}
    try:
        model(**inputs, **no_cache)
    finally:
        for hook in hooks:
            hook.remove()
    return kept["scores"].squeeze(-1)


def to_right_padding(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move each row's real tokens to its start, in order. [B, T] both."""
    order = torch.argsort(attention_mask.bool().logical_not().to(torch.uint8), dim=-1, stable=True)
    return input_ids.gather(-1, order), attention_mask.gather(-1, order)
