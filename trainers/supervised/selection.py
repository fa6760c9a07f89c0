"""Rho-1's selection of tokens (`selective_tokens`): before an optimiser step its batches lose the labels of the tokens
that are not trained, so that whatever computes the loss computes it of the others.

The tokens of the whole step are ranked together, over all micro-batches and processes: what is trained does not depend
on how the step is cut. That takes a pass of the policy without gradient before the one that trains.
"""

from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from align.data.labels import IGNORED
from align.distributed.shards import reshard
from align.errors import ConfigError, TrainingError
from align.modeling.types import Model
from align.objectives.selective import excess_loss, selection_threshold
from align.trainers.core.reference_checks import unlike
from align.trainers.supervised.reference import SupervisedReference, named_reference, trained


def token_selection(trainer: Any, ref_model: str | Model | None) -> "TokenSelection | None":
    """What `selective_tokens` asks of a trainer of SFT that is otherwise made; None where it is not set. ref_model: the
    trainer's argument."""
    ref_model = named_reference(trainer.args, ref_model)
    if trainer.args.selective_tokens is None:
        return None
    if ref_model is None:
        raise ConfigError(
            "selective_tokens needs a reference that knows the text better than the policy does: fine-tune a model on "
            "a little of the best of it, and name it in ref_model_name_or_path",
            key="selective_tokens",
        )
    return TokenSelection(trainer, ref_model)


class TokenSelection:
    """The choice of the tokens of each step of a trainer of SFT by a reference."""

    def __init__(self, trainer: Any, ref_model: str | Model):
        self.trainer, self.share = trainer, trainer.args.selective_tokens
        self.reference = SupervisedReference(trainer, ref_model)

    def narrow(self, model: nn.Module, batches: list[dict[str, Tensor]]) -> None:
        """Masks out the labels of the tokens of one optimiser step that are not trained. model: the policy, as it is
        wrapped for training. All processes call it together."""
        trainer = self.trainer
        self.reference.check_resumed()
        batches[:] = [trainer._prepare_inputs(batch) for batch in batches]
        with trainer.phase("select"), torch.no_grad():
            policy = [self._logps(model, batch) for batch in batches]
        reshard(model)
        with trainer.phase("reference"), self.reference.held.active() as reference:
            excess = [
                excess_loss(logps, self._logps(reference, batch)) for batch, logps in zip(batches, policy, strict=True)
            ]
        of_all = (
            torch.cat(gather_object([torch.cat(excess).cpu()])) if trainer.args.world_size > 1 else torch.cat(excess)
        )
        self._check_differs(of_all)
        threshold = selection_threshold(of_all, self.share).to(excess[0].device)
        for batch, values in zip(batches, excess, strict=True):
            labels = batch["labels"].clone()
            next_labels = labels[:, 1:]
            next_labels[trained(labels)] = next_labels[trained(labels)].masked_fill(values < threshold, IGNORED)
            batch["labels"] = labels
        self._record(torch.cat(policy), torch.cat(excess), threshold)

    def _logps(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Of the tokens with a label, [N]."""
        return self.reference.logps(model, batch)[trained(batch["labels"])]

    def _record(self, logps: Tensor, excess: Tensor, threshold: Tensor) -> None:
        kept = excess >= threshold
        count, of_kept = len(excess), int(kept.sum())
        if not count:
            return
        self.trainer.record("selective/kept", of_kept / count, count)
        self.trainer.record("selective/loss_of_all", -logps.mean(), count)
        self.trainer.record("selective/excess_loss_of_all", excess.mean(), count)
        if of_kept:
            self.trainer.record("selective/excess_loss", excess[kept].mean(), of_kept)

    def _check_differs(self, excess: Tensor) -> None:
        """In the first step of a run: a reference that is the policy ranks by rounding errors."""
        if self.trainer.state.global_step == 0 and unlike(excess.abs(), self.reference.tolerance) is None:
            raise TrainingError(
                "selective_tokens: before the first step the reference gives the tokens the log-probs that the policy "
                f"gives them, up to rounding ({excess.abs().mean():.2g} nats on average). A reference that is the "
                "policy selects by rounding errors: name one that was trained on text of the right kind"
            )
