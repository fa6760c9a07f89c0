"""What ends a run that would go wrong: nothing reaches the weights, no token is trained, numbers are not finite."""

import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from align.errors import ConfigError, TrainingError
from align.modeling.logprobs import language_model

logger = logging.getLogger(__name__)


class GradientsReachTheWeights(TrainerCallback):
    """Before the first update of a run: an error if no trainable weight got a gradient, a warning if some did not."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.looked = False

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.looked:
            return
        self.looked = True
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        without = [name for name, p in trainable.items() if p.grad is None]
        if without:
            found = (
                f"{len(without)} of {len(trainable)} trainable tensors got no gradient ({', '.join(without[:3])} ...)"
            )
            if len(without) == len(trainable):
                raise TrainingError(
                    f"{found}: nothing would be trained. Something on the way from the loss to the weights has no "
                    "backward pass (a quantised layer in its inference form, a detached output)"
                )
            logger.warning("%s. Unused experts or layers may do without; others would not be trained", found)


def check_metrics(metrics: Mapping[str, Any], step: int, output_dir: str | None) -> None:
    bad = {name: value for name, value in metrics.items() if isinstance(value, float) and not math.isfinite(value)}
    if bad:
        raise TrainingError(
            f"non-finite metrics at step {step}: {bad}. Lower the learning rate, or look at the "
            f"rows of this step; nothing was saved after the last checkpoint in {output_dir}."
        )


def check_loss(loss: Tensor, step: int) -> None:
    """step: the one that is being taken, from 1."""
    if not torch.isfinite(loss):
        raise TrainingError(
            f"the loss of step {step} is {loss.item()}. Lower the learning rate, or look at "
            "the rows of this step with --dry-run."
        )


def check_trained_tokens(batches: list, count: Tensor | int | None, step: int) -> None:
    """count: trained items (tokens, pairs) of the step's batches on all processes, None where they are not counted."""
    if batches and count is not None and int(torch.as_tensor(count).sum()) == 0:
        raise TrainingError(
            f"step {step} would train no token: every label of its {len(batches)} batches "
            "is masked out. Look at the loss mask with --dry-run."
        )


def check_weights(parameters: Iterable[Tensor], step: int) -> None:
    """Refuse to save weights that are not finite: the newest checkpoint is the one that is resumed."""
    local = [p.to_local() if isinstance(p, DTensor) else p for p in parameters if p.requires_grad]
    if not all(p.detach().isfinite().all() for p in local):
        raise TrainingError(
            f"the weights are not finite after step {step}: no checkpoint is written. Lower the "
            "learning rate, and resume from the last checkpoint"
        )


def check_experts(model: nn.Module) -> None:
    """Mixtures of experts train without their load-balancing loss here: a warning, or ConfigError if the model's config
    has it switched on."""
    config = language_model(model).config.get_text_config()
    coefficient = vars(config).get("router_aux_loss_coef")
    if not coefficient:
        return
    if vars(config).get("output_router_logits"):
        raise ConfigError(
            "the model's config has output_router_logits: true, and this trainer adds no load-balancing loss: set it "
            "to false and train without, or train with SFT"
        )
    logger.warning(
        "%s is a mixture of experts: its load-balancing loss (router_aux_loss_coef %g) is not in this trainer's loss; "
        "watch whether its experts stay in use, or adapt attention alone (LoRA)",
        type(language_model(model)).__name__,
        coefficient,
    )
