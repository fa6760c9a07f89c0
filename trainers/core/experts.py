"""Adds the load-balancing loss of a mixture of experts to a trainer's loss."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import nn
from transformers import TrainingArguments

from align.errors import ConfigError
from align.modeling.experts import balancing_function, balancing_loss, watched_routers
from align.modeling.logprobs import language_model

logger = logging.getLogger(__name__)
LARGE = 0.1
"""Weight of the load-balancing loss, which is about as many as the experts of a token, from which it is warned of: the
published GPT-OSS have 0.9, so 3.6 beside a DPO loss of 0.69, where other models have 0.001 to 0.01."""


def router_coefficient(model: nn.Module, asked: float | None) -> float:
    """The weight of the load-balancing loss. asked: the run's `router_aux_loss_coef`; None: the model's own. Turns
    `output_router_logits` of the model's config off. ConfigError for a weight and no such loss."""
    core = language_model(model)
    config = vars(core.config.get_text_config())
    own = config.get("router_aux_loss_coef")
    if config.get("output_router_logits"):
        # TRL's SFT leaves it on. Then transformers would add its loss too, where it can: here it is added once, below
        core.config.get_text_config().output_router_logits = False
    if balancing_function(core) is not None:
        if asked is None and own and own >= LARGE:
            logger.warning(
                "router_aux_loss_coef: %g is the model's own, with which the load-balancing loss may outweigh what is "
                "trained for: set it (0.001 is usual, 0 leaves it out)",
                own,
            )
        return (own or 0.0) if asked is None else asked
    if asked:
        raise ConfigError(f"router_aux_loss_coef: transformers has no load-balancing loss for {type(core).__name__}")
    if own and asked is None and config.get("num_local_experts") != 0:  # Granite 4's dense hybrids say 0
        logger.warning(
            "%s is a mixture of experts and is trained without a load-balancing loss, which transformers does not have "
            "for it: watch whether its experts stay in use, or adapt attention alone (LoRA)",
            type(core).__name__,
        )
    return 0.0


@contextmanager
def without_missing_loss(model: nn.Module, args: Any) -> Iterator[None]:
    """While TRL's SFT trainer is made: it would add the load-balancing loss of each mixture whose config has a weight
    for it, and fail at the first step where transformers computes none. The config keeps the weight."""
    core = language_model(model)
    router_coefficient(model, args.router_aux_loss_coef)
    if balancing_function(core) is not None:
        yield
        return
    text, asked = core.config.get_text_config(), args.router_aux_loss_coef
    own = vars(text).get("router_aux_loss_coef")
    args.router_aux_loss_coef = 0.0
    try:
        yield
    finally:
        args.router_aux_loss_coef = asked
        if own is not None:
            text.router_aux_loss_coef = own


def reentrant(args: TrainingArguments) -> bool:
    """Whether gradient checkpointing is the kind whose first pass has no gradient."""
    return bool(args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"))


def check_checkpointing(args: TrainingArguments) -> None:
    """Of a run with the loss: ConfigError for gradient checkpointing whose first pass has no gradient, and so gives
    router logits without one."""
    if reentrant(args):
        raise ConfigError(
            "gradient_checkpointing_kwargs: with use_reentrant: true the load-balancing loss of a mixture of experts "
            "(router_aux_loss_coef) would have no gradient: leave it out, or set router_aux_loss_coef: 0"
        )


def with_router_loss(items: Callable[[dict, TrainingArguments], int]):
    """Of the `compute_loss` of a trainer: adds `router_coefficient` x the load-balancing loss, and logs that as
    `aux_loss`. A micro-batch counts by its share of the step. items: how many of `num_items_in_batch` are in one."""

    def decorate(compute_loss):
        @wraps(compute_loss)
        def with_it(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            if not self.router_coefficient:
                return compute_loss(self, model, inputs, return_outputs, num_items_in_batch)
            core = language_model(model)
            with watched_routers(core) as seen:
                loss = compute_loss(self, model, inputs, return_outputs, num_items_in_batch)
            balance, count = balancing_loss(core, seen["logits"], inputs), items(inputs, self.args)
            if count:  # else all of its samples are left out
                self.record("aux_loss", balance.detach(), count)
            share = count / num_items_in_batch * self.accelerator.num_processes
            return loss + self.router_coefficient * balance * share

        return with_it

    return decorate
