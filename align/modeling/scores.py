"""Scores of sequence classifiers, read at the last real token."""

import inspect

import torch
from torch import Tensor, nn

from align.modeling.load import head_name
from align.modeling.logprobs import language_model


def sequence_scores(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """One score per sequence [B], float32 (or float64), differentiable. input_ids, attention_mask: [B, T].

    The last real token is found from the attention mask alone. transformers looks for the last token that is not the
    padding token instead, which skips the end token wherever the two are the same. Padding may be on either side: rows
    are moved to the left first, so the score does not depend on it. Encoders score with their own pooled output.
    """
    input_ids, attention_mask = to_right_padding(input_ids, attention_mask)
    core = language_model(model)
    last = attention_mask.sum(-1) - 1
    kept = {}

    def keep_head_output(module, args, output):
        kept["scores"] = output

    def replace_output(module, args, output):
        scores = kept["scores"]
        if scores.dim() == 3:  # a head on every token: causal models
            scores = scores[torch.arange(len(last), device=last.device), last]
        kept["scores"] = output.logits = scores if scores.dtype == torch.float64 else scores.float()
        return output

    head = core.get_submodule(head_name(core).split(".")[0])
    # prepended: the wrappers' own hooks must see the tensor through which the gradient comes back
    hooks = [head.register_forward_hook(keep_head_output), core.register_forward_hook(replace_output, prepend=True)]
    no_cache = {"use_cache": False} if "use_cache" in inspect.signature(type(core).forward).parameters else {}
    try:
        model(input_ids=input_ids, attention_mask=attention_mask, **no_cache)
    finally:
        for hook in hooks:
            hook.remove()
    return kept["scores"].squeeze(-1)


def to_right_padding(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move each row's real tokens to its start, in order. [B, T] both."""
    order = torch.argsort(attention_mask.bool().logical_not().to(torch.uint8), dim=-1, stable=True)
    return input_ids.gather(-1, order), attention_mask.gather(-1, order)
