"""The reference of a trainer of SFT: log-probs of a batch's tokens as TRL's trainer computes the policy's."""

from typing import Any

import torch
from torch import Tensor, nn
from trl.trainer.utils import add_fused_lm_head

from align.data.labels import IGNORED
from align.data.limits import check_fits, reader_of
from align.data.streams import is_stream
from align.distributed.shards import outputs_as_computed
from align.errors import ConfigError
from align.modeling.load import Reference
from align.modeling.logprobs import language_model
from align.modeling.rotary import share_factors
from align.modeling.types import Model
from align.trainers.core.reference_checks import (
    check_reference,
    logp_tolerance,
    named_reference_identity,
    reference_probe,
)
from align.trainers.pairs.reference import load_reference, make_reference


def named_reference(args: Any, ref_model: str | Model | None) -> str | Model | None:
    """The reference that is named, by the trainer's argument or by `ref_model_name_or_path`; None where none is."""
    if ref_model is not None and args.selective_tokens is None and args.implicit_reward_beta is None:
        raise ConfigError(
            "ref_model: supervised fine-tuning has a reference only with selective_tokens or implicit_reward_beta"
        )
    if ref_model is not None and args.ref_model_name_or_path is not None:
        raise ConfigError("the reference is named twice, by ref_model and by ref_model_name_or_path")
    return args.ref_model_name_or_path if ref_model is None else ref_model


class SupervisedReference:
    """A reference of a trainer that is otherwise made. ref_model: None is the policy as it is now: a copy of it, or the
    policy with its adapter off."""

    def __init__(self, trainer: Any, ref_model: str | Model | None):
        args, self.trainer = trainer.args, trainer
        sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        if args.ref_dtype is not None and sharded:
            raise ConfigError(
                "ref_dtype: a sharded reference has the precision of the policy's shards; leave it out", key="ref_dtype"
            )
        dtype = None if args.ref_dtype is None else getattr(torch, args.ref_dtype)
        model = load_reference(ref_model, trainer.model, dtype)
        self.held: Reference = make_reference(trainer.model, model, for_one_pass=False, dtype=dtype)
        self.is_start = ref_model is None
        core = language_model(self.held.model)
        share_factors(core, trainer.model)
        if not self.is_start and is_stream(trainer.train_dataset):
            trainer.readers.append(reader_of(core, "reference"))
        elif not self.is_start:
            check_fits(core, trainer.train_dataset, "training", trainer.processing_class, "reference")
        if not self.held.adapter_off:
            add_fused_lm_head(core)  # before it is sharded, as TRL adds it to the policy
            self.held.prepare(trainer.accelerator)
        self._checked = False

    @property
    def tolerance(self) -> float:
        return logp_tolerance(self.trainer.accelerator, self.held.model)

    def logps(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Of each token but the first under a model, [B, T-1], in nats, 0 where it has no label; without dropout or
        noise."""
        training = model.training
        model.eval()
        try:
            with outputs_as_computed(model), self.trainer.compute_loss_context_manager():
                outputs = model(**batch, use_cache=False, fused_lm_head=True)
        finally:
            model.train(training)
        return outputs.log_probs.float()

    def identity(self) -> dict[str, str]:
        return named_reference_identity(self.held, not self.is_start)

    def state(self) -> dict[str, Tensor]:
        """What tells this reference from another in a checkpoint."""
        return {"reference": reference_probe(self.held, self.trainer.args.device)}

    def check_resumed(self) -> None:
        """Of a resumed run, once: it has the reference of the run that is resumed."""
        changed = "reference" in (self.trainer.args.resume_changes or [])
        if not self._checked and self.trainer.resume_state is not None and not changed:
            check_reference(self.state()["reference"], self.trainer.resume_state["reference"], self.tolerance)
        self._checked = True


def trained(labels: Tensor) -> Tensor:
    """Which tokens but the first of each row are trained, [B, T-1]. labels: [B, T]."""
    return labels[:, 1:] != IGNORED
