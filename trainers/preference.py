"""The one loop for offline preference pairs: pairs -> policy and reference log-probs -> losses per pair -> update.

A method is a subclass that says what its losses are (`losses`); it may also override `forward` (other inputs than the
two models' token log-probs), `columns` and `prepare_dataset` (further inputs per pair), and the three class attributes
that say what its losses need. The loss of an optimiser step is the mean over all of its pairs, whatever the
micro-batches and processes.
"""

import logging
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer, set_seed

from align.data.collate import PairCollator
from align.data.tokenize import tokenize_pairs
from align.errors import ConfigError, TrainingError
from align.modeling.load import disable_dropout, load_policy, load_tokenizer, reference_of
from align.modeling.pairs import PairTokens, pair_tokens
from trainers.base import BaseConfig, TrainerMixin

logger = logging.getLogger(__name__)

TOKENIZED = ("prompt_ids", "chosen_ids", "rejected_ids")


class PairRows:
    """The rows of one batch as they are in the dataset; no list, or accelerate would walk through every token."""

    def __init__(self, rows: list[dict]):
        self.rows = rows


@dataclass
class PreferenceConfig(BaseConfig):
    """Options of every method that trains on pairs. Batch sizes count pairs."""

    learning_rate: float = field(default=1e-6, metadata={"help": "Initial learning rate of AdamW."})
    beta: float = field(default=0.1, metadata={"help": "Strength of the KL constraint to the reference."})
    max_length: int | None = field(
        default=1024, metadata={"help": "Prompt and completion together, in tokens; longer completions are cut."}
    )
    ref_model_name_or_path: str | None = field(
        default=None, metadata={"help": "The reference. Default: the policy as it starts (LoRA: the adapter off)."}
    )
    chunk_size: int | None = field(
        default=None, metadata={"help": "Tokens per chunk of logits. Default: bounded by memory (256 MiB)."}
    )
    disable_dropout: bool = field(
        default=True, metadata={"help": "Dropout makes the policy differ from its reference."}
    )
    num_logged_pairs: int = field(default=8, metadata={"help": "Pairs shown per evaluation in the tracker; 0: none."})

    def __post_init__(self):
        super().__post_init__()
        if self.beta <= 0:
            raise ConfigError(f"beta must be > 0, got {self.beta}")


class PreferenceTrainer(TrainerMixin, Trainer):
    """The loop. Subclasses implement `losses`.

    Args:
        model: a model, a folder or a hub name.
        train_dataset, eval_dataset: preference pairs in TRL's formats, or the output of `tokenize_pairs`.
        ref_model: the reference; by default the policy as it starts (with LoRA: the adapter switched off).
        peft_config: trains an adapter.
    """

    _tag_names = ["align", "preference"]

    # ---- what a method says of its losses ---------------------------------------------------------------------------

    columns: tuple[str, ...] = ()
    """Numeric columns of the dataset that go into the batch as float32 tensors [B]."""
    needs_reference = True
    """False: no reference is loaded, and `losses` gets None for it. May be a property that looks at `self.args`."""
    across_pairs = False
    """True: the loss of a pair depends on the others of its batch. A micro-batch is then exactly one per-device batch
    of `per_device_train_batch_size` pairs, in the order of the data."""

    def losses(
        self, policy: PairTokens, reference: PairTokens | None, batch: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The losses of the pairs [B], whose mean is trained on, and what to log: a number per pair [B] by metric."""
        raise TypeError(f"{type(self).__name__} does not say what its losses are")

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[PairTokens, PairTokens | None]:
        """The tokens of policy and reference: what `losses` gets. Under `torch.no_grad` in evaluations."""
        policy = pair_tokens(model, batch, chunk_size=self.args.chunk_size)
        return policy, self.reference_tokens(batch) if self.needs_reference else None

    def prepare_dataset(self, dataset, name: str):
        """Tokenised pairs -> the same with what the method needs beside them; name: train or eval. Called once per
        dataset, before the columns that are not needed are dropped."""
        return dataset

    # ---- set-up -----------------------------------------------------------------------------------------------------

    def __init__(
        self,
        model: str | nn.Module,
        args: PreferenceConfig,
        train_dataset,
        eval_dataset=None,
        processing_class=None,
        ref_model: str | nn.Module | None = None,
        peft_config=None,
        callbacks=None,
        optimizers=(None, None),
    ):
        processing_class = processing_class or load_tokenizer(model)
        set_seed(args.seed)  # a new adapter is drawn at random
        self.args = args
        model = load_policy(model, peft_config=peft_config)
        if args.disable_dropout:
            disable_dropout(model)
        ref_model = ref_model or args.ref_model_name_or_path
        self.reference = reference_of(model, ref_model) if self.needs_reference else None
        self.collator = PairCollator(processing_class.pad_token_id)
        self._eval_names: tuple[str, ...] = ()
        self._predictions: np.ndarray | None = None
        args.remove_unused_columns = False
        super().__init__(
            model=model,
            args=args,
            data_collator=PairRows,
            train_dataset=self._prepared(train_dataset, processing_class, "train"),
            eval_dataset=None if eval_dataset is None else self._prepared(eval_dataset, processing_class, "eval"),
            processing_class=processing_class,
            compute_metrics=self._eval_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.model_accepts_loss_kwargs = True  # the loss is normalised by the global count of pairs, not by Trainer
        if self.reference is not None:
            self.reference.prepare(self.accelerator)

    def _prepared(self, dataset, tokenizer, name: str):
        if not set(TOKENIZED) <= set(dataset.column_names):
            args = self.args
            dataset = tokenize_pairs(dataset, tokenizer, max_length=args.max_length, max_bad_share=args.max_bad_share)
        dataset = self.prepare_dataset(dataset, name)
        wanted = (*TOKENIZED, "row", *self.columns)
        return dataset.select_columns([column for column in wanted if column in dataset.column_names])

    # ---- batches ----------------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """One optimiser step. transformers counts `num_batches` of them, so the last carries all micro-batches."""
        if self.finished:  # as in TrainerMixin
            return [], None
        groups = list(islice(epoch_iterator, num_batches))
        if not groups:
            return [], None
        pairs = torch.tensor([sum(len(group.rows) for group in groups)], device=device)
        batches = [self.collate(group.rows) for group in groups]
        return [[]] * (len(groups) - 1) + [batches], self.accelerator.gather(pairs).sum()

    def collate(self, rows: list[dict]) -> dict[str, Tensor]:
        """One micro-batch: the collator's tensors, and the method's columns."""
        batch = self.collator(rows)
        for column in self.columns:
            batch[column] = torch.tensor([row[column] for row in rows], dtype=torch.float32)
        return batch

    def floating_point_ops(self, inputs: list[dict]) -> int:
        return sum(super(PreferenceTrainer, self).floating_point_ops(batch) for batch in inputs)

    def training_step(self, model, inputs: list[dict], num_items_in_batch=None):
        total = torch.zeros((), device=self.args.device)
        for batch in inputs:
            total += super().training_step(model, batch, num_items_in_batch)
        return total

    # ---- loss -------------------------------------------------------------------------------------------------------

    def reference_tokens(self, batch: dict[str, Tensor]) -> PairTokens:
        """The reference's tokens of a batch, without gradient."""
        with self.phase("reference"), self.reference.active() as model:
            return pair_tokens(model, batch, chunk_size=self.args.chunk_size)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        policy, reference = self.forward(model, inputs)
        losses, metrics = self.losses(policy, reference, inputs)
        self._check_losses(losses, inputs)
        for name, values in metrics.items():
            self.record(name, values.detach().float().mean().item(), len(values))
        # The count is of all ranks, and DDP averages the gradients over them.
        return losses.sum() * self.accelerator.num_processes / num_items_in_batch

    def _check_losses(self, losses: Tensor, batch: dict[str, Tensor]) -> None:
        finite = losses.detach().isfinite()
        if not finite.all():
            where = f"rows {batch['row'][~finite].tolist()}" if "row" in batch else f"{(~finite).sum()} pairs"
            raise TrainingError(
                f"step {self.state.global_step + 1}: the loss is not finite on {where}. Lower the learning rate, or "
                "look at these rows"
            )

    # ---- evaluation -------------------------------------------------------------------------------------------------

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        batch = self._prepare_inputs(self.collate(inputs.rows))
        with torch.no_grad():
            policy, reference = self.forward(model, batch)
            losses, metrics = self.losses(policy, reference, batch)
        self._check_losses(losses, batch)
        self._eval_names = ("loss", *metrics)
        values = torch.stack([losses.float(), *(v.float() for v in metrics.values())], dim=-1)
        return None, values, values[:, 0]  # the means over pairs are taken in _eval_metrics; labels are not looked at

    def _eval_metrics(self, prediction) -> dict[str, float]:
        self._predictions = prediction.predictions
        return {name: float(v) for name, v in zip(self._eval_names, self._predictions.mean(0), strict=True)}
