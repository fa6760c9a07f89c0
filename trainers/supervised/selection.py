"""Rho-1's selection of tokens (`selective_tokens`): before an optimiser step its batches lose the labels of the tokens
that are not trained, so that whatever computes the loss computes it of the others.

The tokens of the whole step are ranked together, over all micro-batches and processes: what is trained does not depend
on how the step is cut. That takes a pass of the policy without gradient before the one that trains.
"""

from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from trl.trainer.utils import add_fused_lm_head

from align.data.collate import IGNORED
from align.data.limits import check_fits
from align.data.streams import is_stream
from align.distributed.shards import outputs_as_computed, reshard
from align.errors import ConfigError, TrainingError
from align.modeling.load import Reference
from align.modeling.logprobs import language_model
from align.modeling.types import Model
from align.objectives.selective import excess_loss, selection_threshold
from align.trainers.core.reference_checks import check_reference, logp_tolerance, reference_probe, unlike
from align.trainers.pairs.reference import load_reference, make_reference


def token_selection(trainer: Any, ref_model: str | Model | None) -> "TokenSelection | None":
    """What `selective_tokens` asks of a trainer of SFT that is otherwise made; None where it is not set. ref_model: the
    trainer's argument."""
    args = trainer.args
    if args.selective_tokens is None:
        if ref_model is not None:
            raise ConfigError("ref_model: supervised fine-tuning has a reference only with selective_tokens")
        return None
    if ref_model is not None and args.ref_model_name_or_path is not None:
        raise ConfigError("the reference is named twice, by ref_model and by ref_model_name_or_path")
    ref_model = ref_model or args.ref_model_name_or_path
    if ref_model is None:
        raise ConfigError(
            "selective_tokens needs a reference that knows the text better than the policy does: fine-tune a model on "
            "a little of the best of it, and name it in ref_model_name_or_path",
            key="selective_tokens",
        )
    parallel = trainer.accelerator.parallelism_config
    if parallel is not None and (parallel.cp_enabled or parallel.sp_enabled):
        raise ConfigError(
            "selective_tokens: the tokens of a sequence must be in one process: leave out context and sequence "
            "parallelism",
            key="selective_tokens",
        )
    return TokenSelection(trainer, ref_model)


class TokenSelection:
    """The reference of a trainer of SFT, and the choice of the tokens of each step by it."""

    def __init__(self, trainer: Any, ref_model: str | Model):
        args, self.trainer, self.share = trainer.args, trainer, trainer.args.selective_tokens
        sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        if args.ref_dtype is not None and sharded:
            raise ConfigError(
                "ref_dtype: a sharded reference has the precision of the policy's shards; leave it out", key="ref_dtype"
            )
        dtype = None if args.ref_dtype is None else getattr(torch, args.ref_dtype)
        model = load_reference(ref_model, trainer.model, dtype)
        self.reference: Reference = make_reference(trainer.model, model, for_one_pass=False, dtype=dtype)
        core = language_model(self.reference.model)
        if not is_stream(trainer.train_dataset):
            check_fits(core, trainer.train_dataset, "training", trainer.processing_class)
        add_fused_lm_head(core)  # before it is sharded, as TRL adds it to the policy
        self.reference.prepare(trainer.accelerator)
        self._checked = False

    def narrow(self, model: nn.Module, batches: list[dict[str, Tensor]]) -> None:
        """Masks out the labels of the tokens of one optimiser step that are not trained. model: the policy, as it is
        wrapped for training. All processes call it together."""
        trainer = self.trainer
        self._check_resumed()
        batches[:] = [trainer._prepare_inputs(batch) for batch in batches]
        with trainer.phase("select"), torch.no_grad():
            policy = [self._logps(model, batch) for batch in batches]
        reshard(model)
        with trainer.phase("reference"), self.reference.active() as reference:
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
        """Of the tokens with a label, [N], without dropout or noise."""
        training = model.training
        model.eval()
        try:
            with outputs_as_computed(model), self.trainer.compute_loss_context_manager():
                outputs = model(**batch, use_cache=False, fused_lm_head=True)
        finally:
            model.train(training)
        return outputs.log_probs[trained(batch["labels"])].float()

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
        tolerance = logp_tolerance(self.trainer.accelerator, self.reference.model)
        if self.trainer.state.global_step == 0 and unlike(excess.abs(), tolerance) is None:
            raise TrainingError(
                "selective_tokens: before the first step the reference gives the tokens the log-probs that the policy "
                f"gives them, up to rounding ({excess.abs().mean():.2g} nats on average). A reference that is the "
                "policy selects by rounding errors: name one that was trained on text of the right kind"
            )

    def state(self) -> dict[str, Tensor]:
        """What tells this reference from another in a checkpoint."""
        return {"reference": reference_probe(self.reference, self.trainer.args.device)}

    def _check_resumed(self) -> None:
        if not self._checked and self.trainer.resume_state is not None:
            tolerance = logp_tolerance(self.trainer.accelerator, self.reference.model)
            check_reference(self.state()["reference"], self.trainer.resume_state["reference"], tolerance)
        self._checked = True


def trained(labels: Tensor) -> Tensor:
    """Which tokens but the first of each row are trained, [B, T-1]. labels: [B, T]."""
    return labels[:, 1:] != IGNORED
