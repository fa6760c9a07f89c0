"""The load-balancing loss of mixtures of experts (Fedus et al. 2022, eq. 4-6), by transformers' own function."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from align.modeling.types import Model

BALANCING = "load_balancing_loss_func"  # beside the model, in its module of transformers


def balancing_function(core: Model) -> Callable[..., Tensor] | None:
    """transformers' load-balancing loss of this architecture; None where it has none (classifiers, dense models), or
    its models hand out no router logits (Granite's mixtures): transformers' loss of those is the number 0."""
    from transformers import PreTrainedModel

    models = (module for module in core.base_model.modules() if isinstance(module, PreTrainedModel))
    if not any("router_logits" in model.can_record_outputs for model in models):
        return None
    # FSDP2 and users derive classes from transformers' in modules of their own
    modules = (vars(sys.modules[kind.__module__]) for kind in type(core).__mro__)
    function = next((names[BALANCING] for names in modules if BALANCING in names), None)
    causal = hasattr(core, "num_experts") and hasattr(core, "num_experts_per_tok")
    return function if causal else None


@contextmanager
def experts_by_their_usual_name(core: Model) -> Iterator[None]:
    """Inside, a model's configuration has the number of its experts by the one name that TRL's SFT loss reads
    (`num_local_experts` of Phi-3.5-MoE, `n_routed_experts` of DeepSeek V4)."""
    text = core.config.get_text_config()
    given = balancing_function(core) is not None and not hasattr(text, "num_experts")
    if given:
        text.num_experts = core.num_experts
    try:
        yield
    finally:
        if given:
            del text.num_experts


@contextmanager
def watched_routers(core: Model) -> Iterator[dict[str, Any]]:
    """A dict that holds `logits` once the model has run with gradient inside: the router's of every layer,
    [rows * T, experts] each; of the last such run."""
    seen: dict[str, Any] = {}

    def ask(module, args, kwargs):
        return args, {**kwargs, "output_router_logits": True}

    def keep(module, args, output):
        if torch.is_grad_enabled():  # not a reference, which may be the same module with its adapter off
            seen["logits"] = output.router_logits

    # of the trunk: the causal model would compute the loss of rows with shared prefixes by a mask that it cannot read
    trunk = core.base_model
    hooks = trunk.register_forward_pre_hook(ask, with_kwargs=True), trunk.register_forward_hook(keep)
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def balancing_loss(core: Model, logits: tuple[Tensor, ...], batch: dict[str, Tensor]) -> Tensor:
    """The loss of a batch, a scalar: experts x sum over experts of (share of the tokens) x (mean probability).

    batch: with `attention_mask`: [B, T], 0 for padding, which does not count; or the table of `modeling.shared_prefix`
    (and `completion_sources`), where a token of a prefix counts once for every sequence that it belongs to. So both
    layouts of a batch have the same loss, but for last tokens that predict nothing, which only padded rows hold.
    """
    mask = batch["attention_mask"]
    counts = mask if mask.dim() == 2 else _sequences_of_tokens(mask, batch["completion_sources"][:, 0])
    function = balancing_function(core)
    if function is None:
        raise TypeError(f"{type(core).__name__} has no load-balancing loss")
    return function(logits, core.num_experts, core.num_experts_per_tok, counts)


def _sequences_of_tokens(table: Tensor, first_sources: Tensor) -> Tensor:
    """[T]: how many sequences each token of a row with shared prefixes belongs to. table: [1, 1, groups, 1 + rests],
    whose zeros say nothing: rests that are empty, or a group of fewer rests. first_sources: [sequences], a position in
    the prefix of each."""
    lengths = table.view(-1, table.shape[-1])
    sizes = lengths.sum(-1)
    groups = torch.searchsorted(sizes.cumsum(0) - sizes, first_sources.contiguous(), right=True) - 1
    counts = torch.ones_like(lengths)
    counts[:, 0] = torch.bincount(groups, minlength=len(lengths))
    return counts.flatten().repeat_interleave(lengths.flatten())
