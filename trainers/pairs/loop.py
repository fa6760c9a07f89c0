"""The one loop for offline preference pairs: pairs -> policy and reference log-probs -> losses per pair -> update.

A method is a subclass that says what its losses are (`losses`); it may also override `forward` (other inputs than the
two models' token log-probs), `columns` and `prepare_dataset` (further inputs per pair), and the attributes that say
what its losses need. The loss of an optimiser step is the mean over all of its pairs, whatever the micro-batches and
processes.
"""

import math
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor, nn
from transformers import Trainer, set_seed

from align.errors import ConfigError, TrainingError
from align.modeling.load import disable_dropout, load_policy, load_tokenizer
from align.modeling.pairs import PairTokens, pair_tokens
from align.modeling.prefix_support import enable_shared_prefix
from align.trainers.core.batching import BatchingOptions, resolve_layout
from align.trainers.core.options import BaseConfig
from align.trainers.core.trainer import TrainerMixin
from align.trainers.pairs.batches import PaddedPairs, PairRows, SharedPrefixPairs, split_to
from align.trainers.pairs.data import IDS, flat_column, numbered_pairs
from align.trainers.pairs.evaluation import PairEvaluation
from align.trainers.pairs.reference import PairReference
from align.trainers.pairs.reference_cache import COLUMNS as REF_COLUMNS


@dataclass
class PreferenceConfig(BatchingOptions, BaseConfig):
    """Options of every method that trains on pairs. Batch sizes count pairs."""

    learning_rate: float = field(default=1e-6, metadata={"help": "Initial learning rate of AdamW."})
    beta: float = field(default=0.1, metadata={"help": "Strength of the KL constraint to the reference."})
    max_length: int | None = field(
        default=1024, metadata={"help": "Prompt and completion together, in tokens; longer completions are cut."}
    )
    ref_model_name_or_path: str | None = field(
        default=None, metadata={"help": "The reference. Default: the policy as it starts (LoRA: the adapter off)."}
    )
    precompute_ref_log_probs: bool = field(
        default=False,
        metadata={"help": "Compute the reference's log-probs once, before training, and keep them on disk."},
    )
    precompute_ref_batch_size: int | None = field(
        default=None, metadata={"help": "Pairs per batch of that. Default: as in training or evaluation."}
    )
    ref_log_probs_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of these log-probs, which runs may share. Default: output_dir/ref_log_probs."},
    )
    tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Cut an optimiser step's pairs into micro-batches of at most so many tokens (padding counted) "
            "instead of per_device_train_batch_size pairs. Does not change the loss."
        },
    )
    chunk_size: int | None = field(
        default=None, metadata={"help": "The most tokens whose logits exist at once. Default: as many as are fast."}
    )
    disable_dropout: bool = field(
        default=True, metadata={"help": "Dropout makes the policy differ from its reference."}
    )
    num_logged_pairs: int = field(default=8, metadata={"help": "Pairs shown per evaluation in the tracker; 0: none."})

    def __post_init__(self):
        super().__post_init__()
        if self.beta is not None and not 0 < self.beta < math.inf:
            raise ConfigError(f"beta must be > 0, got {self.beta}")
        for name in ("precompute_ref_batch_size", "tokens_per_batch", "chunk_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name} counts from 1, got {getattr(self, name)}")
        given = [n for n in ("precompute_ref_batch_size", "ref_log_probs_dir") if getattr(self, n) is not None]
        if given and not self.precompute_ref_log_probs:
            raise ConfigError(f"{', '.join(given)}: only with precompute_ref_log_probs")

    def holds_reference(self, adapter: bool) -> bool:
        """Whether a second model is held while the policy, or an adapter on it, is trained."""
        return not self.precompute_ref_log_probs and (self.ref_model_name_or_path is not None or not adapter)


class PreferenceTrainer(PairEvaluation, PairReference, TrainerMixin, Trainer):
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
    """Numeric columns of the dataset that go into the batch as float32 tensors [B, ...]."""
    needs_reference = True
    """False: no reference is loaded, and `losses` gets None for it. May be a property that looks at `self.args`."""
    needs_reference_model = False
    """True: `forward` takes more from the reference than the log-probs of the tokens, so that these alone, computed
    beforehand, are not enough."""
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
        self.args = args
        ref_model = self._reference_given(ref_model)
        set_seed(args.seed)  # a new adapter is drawn at random
        model = load_policy(model, peft_config=peft_config, sharded=True)
        if args.disable_dropout:
            disable_dropout(model)
        self.check_start = ref_model is None
        args.remove_unused_columns = False
        super().__init__(
            model=model,
            args=args,
            data_collator=PairRows,
            train_dataset=self._tokenized(train_dataset, processing_class),
            eval_dataset=None if eval_dataset is None else self._tokenized(eval_dataset, processing_class),
            processing_class=processing_class,
            compute_metrics=self.pair_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.model_accepts_loss_kwargs = True  # the loss is normalised by the global count of pairs, not by Trainer
        self.reference = None
        ref_model = self.load_reference(ref_model)
        models = [self.model] if ref_model is None else [self.model, ref_model]
        # before a reference is copied from the policy
        shares = resolve_layout(args.batching, (enable_shared_prefix(model, args.max_length) for model in models))
        self.collator = SharedPrefixPairs() if shares else PaddedPairs(processing_class.pad_token_id)
        if self.needs_reference:
            self.set_reference(ref_model)
        self.train_dataset = self._prepared(self.train_dataset, "train")
        if self.eval_dataset is not None:
            self.eval_dataset = self._prepared(self.eval_dataset, "eval")
        if args.precompute_ref_log_probs and not self.reference.adapter_off:
            self.reference = None  # what it was for is on disk

    def _reference_given(self, ref_model: str | nn.Module | None) -> str | nn.Module | None:
        """The model that serves as reference if one is named; ConfigError for options that would be ignored."""
        args = self.args
        if ref_model is not None and args.ref_model_name_or_path is not None:
            raise ConfigError("the reference is named twice, by ref_model and by ref_model_name_or_path")
        ref_model = ref_model or args.ref_model_name_or_path
        if not self.needs_reference and (ref_model is not None or args.precompute_ref_log_probs):
            raise ConfigError(
                "this loss has no reference: leave out ref_model, ref_model_name_or_path and precompute_ref_log_probs"
            )
        if self.needs_reference_model and args.precompute_ref_log_probs:
            raise ConfigError(
                "precompute_ref_log_probs: this loss compares whole distributions with the reference's at every token, "
                "so log-probs of the tokens alone are not enough"
            )
        if self.across_pairs and args.tokens_per_batch is not None:
            raise ConfigError(
                "tokens_per_batch: this loss depends on which pairs are in a micro-batch together, so a micro-batch is "
                "per_device_train_batch_size pairs"
            )
        return ref_model

    def _tokenized(self, dataset, tokenizer):
        args = self.args
        return numbered_pairs(dataset, tokenizer, max_length=args.max_length, max_bad_share=args.max_bad_share)

    def _prepared(self, dataset, name: str):
        dataset = self.prepare_dataset(dataset, name)
        dataset = dataset.select_columns([*IDS, "row", *self.columns])
        return self.with_cached_reference(dataset, name) if self.args.precompute_ref_log_probs else dataset

    # ---- batches ----------------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """One optimiser step. transformers counts `num_batches` of them, so the last carries all micro-batches."""
        if self.finished:  # as in TrainerMixin
            return [], None
        groups = [batch.rows for batch in islice(epoch_iterator, num_batches)]
        if not groups:
            return [], None
        if self.state.global_step == self.resume_step:
            self.restore_state(self.resume_state)
        rows = [row for group in groups for row in group]
        batches = groups if self.across_pairs else self.micro_batches(rows, self.args.train_batch_size)
        mine = torch.tensor([[len(rows), chosen_tokens(rows), len(batches)]], device=device)
        pairs, tokens, most = self.accelerator.gather(mine).unbind(-1)
        if not self.across_pairs:
            batches = split_to(batches, int(most.max()))
        batches = [self.collate(batch) for batch in batches]
        for batch in batches:
            batch["mean_chosen_length"] = tokens.sum() / pairs.sum()
        return [[]] * (len(groups) - 1) + [batches], pairs.sum()

    def micro_batches(self, rows: list[dict], max_pairs: int) -> list[list[dict]]:
        """Rows in micro-batches of `tokens_per_batch` tokens, or without it of `max_pairs` pairs."""
        limit = self.args.tokens_per_batch
        return self.collator.cut(rows, None if limit else max_pairs, limit)

    def collate(self, rows: list[dict]) -> dict[str, Tensor]:
        """One micro-batch: the collator's tensors, the method's columns and the cached reference. The loop adds
        `mean_chosen_length`, the mean number of tokens of the chosen completions over all pairs of the step."""
        batch = self.collator(rows)
        for column in self.columns:
            batch[column] = torch.tensor([row[column] for row in rows], dtype=torch.float32)
        if REF_COLUMNS[0] in rows[0]:
            batch["ref_logps"] = right_pad_values([row[column] for column in REF_COLUMNS for row in rows])
        return batch

    def floating_point_ops(self, inputs: list[dict]) -> int:
        return sum(super(PreferenceTrainer, self).floating_point_ops(batch) for batch in inputs)

    def _track_num_input_tokens(self, inputs: list[dict]) -> None:
        for batch in inputs:
            super()._track_num_input_tokens(batch)

    def training_step(self, model, inputs: list[dict], num_items_in_batch=None):
        total = torch.zeros((), device=self.args.device)
        for number, batch in enumerate(inputs, start=1):
            with nullcontext() if number == len(inputs) else self._no_sync(model):
                total += super().training_step(model, batch, num_items_in_batch)
        return total

    @contextmanager
    def _no_sync(self, model):
        """Gradients are summed over processes, and DeepSpeed takes its step, after the last micro-batch."""
        state = self.accelerator.gradient_state
        before = state.sync_gradients
        state._set_sync_gradients(False)
        try:
            with self.accelerator.no_sync(model):
                yield
        finally:
            state._set_sync_gradients(before)

    # ---- loss -------------------------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        values = self.pair_values(model, inputs)
        losses = values.pop("loss")
        means = torch.stack([column.detach().float().mean() for column in values.values()]).tolist()
        for name, mean in zip(values, means, strict=True):
            self.record(name, mean, len(losses))
        # The count is of all ranks, and DDP averages the gradients over them.
        return losses.sum() * self.accelerator.num_processes / num_items_in_batch

    def pair_values(self, model, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        policy, reference = self.forward(model, batch)
        if self.check_start and model.training and self.state.global_step == 0 and reference is not None:
            self.check_same_start(policy.logps.detach(), reference.logps, policy.mask)
        losses, metrics = self.losses(policy, reference, batch)
        finite = losses.detach().isfinite()
        if not finite.all():
            raise TrainingError(
                f"step {self.state.global_step + 1}: the loss is not finite on rows {batch['row'][~finite].tolist()}. "
                "Look at these rows, or lower the learning rate"
            )
        return {"loss": losses, **metrics}

    # ---- evaluation -------------------------------------------------------------------------------------------------

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """As transformers' `evaluate`; `eval_dataset` is prepared as the trainer's own is."""
        if eval_dataset is not None:
            eval_dataset = self._prepared(self._tokenized(eval_dataset, self.processing_class), "eval")
        with self.phase("evaluate"):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def evaluation_loop(self, dataloader, *args, **kwargs):
        self._eval_chosen_length = flat_column(dataloader.dataset, "chosen_ids")[0].mean()
        return super().evaluation_loop(dataloader, *args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        batch = self.collate(inputs.rows)
        batch["mean_chosen_length"] = torch.tensor(self._eval_chosen_length, dtype=torch.float32)
        return super().prediction_step(model, batch, prediction_loss_only, ignore_keys)


def chosen_tokens(rows: list[dict]) -> int:
    return sum(len(row["chosen_ids"]) for row in rows)


def right_pad_values(rows: list[list[float]]) -> Tensor:
    """[B, L] float32, 0 after a row's end."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=torch.float32) for row in rows], batch_first=True)
