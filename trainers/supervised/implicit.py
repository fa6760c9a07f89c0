"""Implicit-reward fine-tuning (UFT, `implicit_reward_beta`): the loss of a sequence is of its whole log-prob against
that of a reference (`align.objectives.implicit_sft`).

The mean is over the sequences of the whole optimiser step, all micro-batches and processes. TRL's trainer divides a
sum of token losses by the number of tokens of the step; it is given the sequences' losses, and their number.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from align.data.checks import SCORE
from align.data.labels import IGNORED
from align.distributed.shards import reshard
from align.errors import ConfigError
from align.modeling.types import Model
from align.objectives.implicit_sft import implicit_reward_loss
from align.trainers.core.reference_checks import check_no_noise, check_same_start
from align.trainers.supervised.reference import SupervisedReference, named_reference, trained

Batch = dict[str, Any]
OF_STEP, SCORES = "implicit", "scores"
"""Keys of a batch that are not for the model: what `ImplicitRewards.prepare` has found, and the given rewards [B]."""


@dataclass
class OfReference:
    """What the loss of a batch needs beside the batch, of its N sequences with a trained token."""

    logps: Tensor
    """[N], float32: of the whole sequences, in nats."""
    scores: Tensor | float


def check_options(args: Any) -> None:
    """Of an SFTConfig: ConfigError for what cannot go with `implicit_reward_beta`, or would have no effect."""
    if args.implicit_reward_beta is None:
        return
    if args.loss_type != "nll":
        problem = f"loss_type: {args.loss_type} is another loss: leave one of the two out"
    elif args.label_smoothing_factor:
        problem = "label_smoothing_factor is for the loss of tokens, and this one is of sequences: leave it out"
    elif args.packing and args.packing_strategy != "bfd":
        problem = f"packing_strategy: {args.packing_strategy} cuts sequences in parts: use bfd"
    else:
        return
    raise ConfigError(f"implicit_reward_beta: {problem}", key="implicit_reward_beta")


def implicit_rewards(trainer: Any, ref_model: str | Model | None, scored: bool) -> "ImplicitRewards | None":
    """What `implicit_reward_beta` asks of a trainer of SFT that is otherwise made; None where it is not set. ref_model:
    the trainer's argument. scored: the rows have the column `score`."""
    args = trainer.args
    if args.implicit_reward_beta is None:
        return None
    check_no_noise(args)
    if not trainer.model_accepts_loss_kwargs:
        raise ConfigError(
            "implicit_reward_beta: the model's forward takes no keyword arguments of its loss, so transformers would "
            "take the mean of each micro-batch by itself",
            key="implicit_reward_beta",
        )
    if scored and args.packing:
        raise ConfigError(
            "packing: TRL packs tokens and labels alone, and the rows' scores would be lost: leave packing out "
            "(padding_free needs no padding either), or drop the column score",
            key="packing",
        )
    if scored:
        trainer.data_collator = WithScores(trainer.data_collator)
    return ImplicitRewards(trainer, named_reference(args, ref_model))


@dataclass
class WithScores:
    """Adds `scores` [B] float32 to the batches of another collator, from the rows' `score`; 1 where that is null."""

    collate: Callable[[list[dict]], Batch]

    def __call__(self, rows: list[dict]) -> Batch:
        scores = [1.0 if row.get(SCORE) is None else float(row[SCORE]) for row in rows]
        return {**self.collate(rows), SCORES: torch.tensor(scores)}


class ImplicitRewards:
    """The reference of a trainer of SFT, and the loss of implicit rewards by it."""

    def __init__(self, trainer: Any, ref_model: str | Model | None):
        self.trainer, self.beta = trainer, trainer.args.implicit_reward_beta
        self.reference = SupervisedReference(trainer, ref_model)

    def prepare(self, model: nn.Module, batches: list[Batch], device: torch.device) -> Tensor:
        """Adds `OF_STEP` to the batches of one optimiser step, and returns how many sequences it trains, on all
        processes. model: the policy, as it is wrapped for training. All processes call it together."""
        self.reference.check_resumed()
        given = [batch.pop(SCORES, None) for batch in batches]
        batches[:] = [self.trainer._prepare_inputs(batch) for batch in batches]
        count = 0
        with self.trainer.phase("reference"):
            for number, (batch, scores) in enumerate(zip(batches, given, strict=True)):
                with self.reference.held.active() as reference:
                    tokens = self.reference.logps(reference, batch)
                if self.reference.is_start and self.trainer.untrained and number == 0:
                    self._check_start(model, batch, tokens)
                kept = self._trained_sequences(batch)
                logps = by_sequence(tokens, batch).sum(-1)[kept]
                batch[OF_STEP] = OfReference(logps, 1.0 if scores is None else scores.to(logps.device)[kept])
                count += len(logps)
            reshard(model)  # whose adapter may have been off, or which was checked
        # counted over the processes as transformers counts tokens: the first place of a row is not one
        one_each = pad(torch.zeros(count, dtype=torch.long), (1, 0), value=IGNORED)
        return self.trainer._get_num_items_in_batch([{"labels": one_each}], device)

    def _check_start(self, model: nn.Module, batch: Batch, tokens: Tensor) -> None:
        with torch.no_grad():
            policy = self.reference.logps(model, batch)
        mask = trained(batch["labels"])
        if mask.any():
            check_same_start(policy, tokens, mask, self.reference.tolerance)

    def loss(self, compute_loss: Callable[..., Any], model: nn.Module, batch: Batch, count: Any) -> Any:
        """compute_loss: TRL's, which gets the sequences' losses for those of tokens. count: as `prepare` gave it."""
        of_reference = batch[OF_STEP]

        def with_losses(**inputs):
            outputs = model(**inputs)
            outputs.log_probs = -self._losses(outputs.log_probs, batch, of_reference)
            return outputs

        return compute_loss(with_losses, for_model(batch), False, count)

    def _losses(self, tokens: Tensor, batch: Batch, of_reference: OfReference) -> Tensor:
        """[N]. tokens: log-probs under the policy, [B, T-1]."""
        logps = by_sequence(tokens, batch).sum(-1)[self._trained_sequences(batch)]
        losses, rewards = implicit_reward_loss(logps, of_reference.logps, of_reference.scores, beta=self.beta)
        count, labels = len(logps), int(trained(batch["labels"]).sum())
        if count:
            with torch.no_grad():
                self.trainer.record("implicit/rewards", rewards.mean(), count)
                self.trainer.record("implicit/sigma", rewards.sigmoid().mean(), count)
                self.trainer.record("implicit/logps", logps.mean(), count)
                self.trainer.record("implicit/token_loss", -logps.sum() / labels, labels)
        return losses

    @staticmethod
    def _trained_sequences(batch: Batch) -> Tensor:
        """Which sequences of a batch have a trained token, [N] bool."""
        return by_sequence(trained(batch["labels"]), batch).any(-1)


def for_model(batch: Batch) -> Batch:
    return {name: value for name, value in batch.items() if name not in (OF_STEP, SCORES)}


def by_sequence(values: Tensor, batch: Batch) -> Tensor:
    """Values of each token but the first of every row, [B, T-1], as one row per sequence, [N, L]. A batch without
    padding is one row in which sequences follow each other, and the first token of each has no label."""
    if "cu_seq_lens_q" not in batch:
        return values
    parts = pad(values, (0, 1))[0].split(batch["cu_seq_lens_q"].diff().tolist())
    return pad_sequence(list(parts), batch_first=True)
