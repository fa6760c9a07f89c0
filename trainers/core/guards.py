"""What ends a run that would go wrong: nothing reaches the weights, no token is trained, numbers are not finite."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from align.errors import ConfigError, TrainingError
from align.trainers.core.ranks import Ranks

logger = logging.getLogger(__name__)


class GradientsReachTheWeights(TrainerCallback):
    """Before the first update of a run: an error if no trainable weight got a gradient, a warning if some did not.
    wrapped: gives the model as it is trained; DDP, unless it looks for them, does not go on with such weights."""

    def __init__(self, wrapped: Callable[[], Any]):
        self.wrapped = wrapped

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
            wrapped = self.wrapped()
            ddp = wrapped if isinstance(wrapped, DistributedDataParallel) else None
            if ddp is not None and not (ddp.find_unused_parameters or ddp.static_graph):
                raise TrainingError(
                    f"{found}, which DDP would wait for: set ddp_find_unused_parameters: true, or train under FSDP2"
                )
            logger.warning("%s. Unused experts or layers may do without; others would not be trained", found)


def check_given_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """ConfigError for an optimiser of the user's that has none of the weights that are trained, as one that was made
    before an adapter was added: nothing would be trained. A warning where it has some of them."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    without = [name for name, parameter in trainable.items() if id(parameter) not in held]
    if trainable and len(without) == len(trainable):
        raise ConfigError(
            f"optimizers: the optimiser has none of the {len(trainable)} tensors that are trained ({without[0]} ...): "
            "nothing would be. With peft_config make the PEFT model first and pass that, or leave the optimiser to "
            "optim and learning_rate"
        )
    if without:
        logger.warning(
            "optimizers: the optimiser has %d of %d trainable tensors: the others are not trained (%s ...)",
            len(trainable) - len(without),
            len(trainable),
            without[0],
        )


class ProcessesAgree(TrainerCallback):
    """Under DDP, after steps 1, 2, 4, 8 ... and before a checkpoint: an error if the processes have other weights, as
    where something has kept DDP from adding up their gradients. Each would train a model of its own, and that of the
    first be saved. Of each trainable tensor a few numbers are compared."""

    PLACES = 8
    ROUNDING = 4  # units in the last place: all add up the same gradients, so that there should be none

    def __init__(self, accelerator: Accelerator):
        self.ranks = Ranks(accelerator)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        step = state.global_step
        if self.ranks.count == 1 or self.ranks.sharded or (step & (step - 1) and not control.should_save):
            return
        trained = {name: p.detach().reshape(-1) for name, p in model.named_parameters() if p.requires_grad}
        numbers = torch.stack([self._some_of(values) for values in trained.values()]).double()
        of_all = self.ranks.gather(numbers[None])
        allowed = torch.tensor([self.ROUNDING * torch.finfo(values.dtype).eps for values in trained.values()])
        differ = (of_all.amax(0) - of_all.amin(0) > allowed[:, None] * of_all.abs().amax(0)).any(1)
        if differ.any():
            first = list(trained)[int(differ.int().argmax())]
            raise TrainingError(
                f"after step {step} the processes have other weights ({int(differ.sum())} of {len(trained)} trainable "
                f"tensors differ, such as {first}): DDP did not add up their gradients, so that each trains a model of "
                "its own. Nothing was saved after the last checkpoint. What differs from a plain run (a callback, a "
                "hook, an option of DDP, a model that something else had wrapped)?"
            )

    def _some_of(self, values: Tensor) -> Tensor:
        return values[torch.arange(self.PLACES, device=values.device) * (len(values) - 1) // (self.PLACES - 1)]


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


def check_trainable(model: nn.Module) -> None:
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            "no parameter of the model requires a gradient, so that nothing would be trained: they are frozen, as "
            "those of a model that an adapter was merged into are (merge_and_unload). Call "
            "model.requires_grad_(True), or pass peft_config"
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
