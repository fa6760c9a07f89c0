"""Preference optimisation on the loop for pairs: policy and reference log-probs -> losses per pair -> update.

A method is a subclass that says what its losses are (`losses`); it may also override `forward` (other inputs than the
two models' token log-probs), `columns` and `prepare_dataset` (further inputs per pair), and the attributes that say
what its losses need.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from tqdm.auto import tqdm

from align.data.sets import of_each
from align.data.streams import is_stream
from align.distributed.ranks import shared
from align.errors import ConfigError, TrainingError
from align.modeling.dropout import has_dropout, without_dropout
from align.modeling.load import Reference, freeze_copy
from align.modeling.logprobs import language_model
from align.modeling.pairs import PairTokens, pair_tokens
from align.modeling.prefix_support import enable_shared_prefix
from align.modeling.types import Model
from align.objectives.pair_losses import PairLosses, RowLosses
from align.trainers.core.batching import CheckSharedRows, autocast_dtype, resolve_layout
from align.trainers.core.eval_completions import show_completions
from align.trainers.core.loading import load_trained, loading_options, tokenizer_of, without_weights
from align.trainers.core.moving_reference import moving_reference
from align.trainers.core.reference_checks import (
    check_no_noise,
    check_reference,
    check_same_start,
    logp_tolerance,
    named_reference_identity,
    reference_probe,
)
from align.trainers.pairs.config import PreferenceConfig
from align.trainers.pairs.data import PairData
from align.trainers.pairs.loop import PairTrainer, UserMetrics
from align.trainers.pairs.micro_batches import MicroBatchPlanner, PaddedPairs, SharedPrefixPairs
from align.trainers.pairs.reference import (
    cached_tokens,
    compute_logps,
    live_tokens,
    load_reference,
    make_reference,
)
from align.trainers.pairs.reference_cache import ReferenceCache, weights_mark
from align.trainers.pairs.reference_shards import ReferenceShards


class PreferenceTrainer(PairTrainer):
    """The loop for a policy. Subclasses implement `losses`.

    Args:
        model: a model, a folder or a hub name.
        train_dataset, eval_dataset: preference pairs in TRL's formats, or the output of `tokenize_pairs`.
        ref_model: the reference; by default the policy as it starts (with LoRA: the adapter switched off).
        peft_config: trains an adapter.
    """

    _tag_names = ["align", "preference"]
    args: PreferenceConfig

    # ---- what a method says of its losses ---------------------------------------------------------------------------

    columns: tuple[str, ...] = ()
    """Numeric columns of the dataset that go into the batch as float32 tensors [B, ...]."""

    padded: type[PaddedPairs] = PaddedPairs
    shared: type[SharedPrefixPairs] = SharedPrefixPairs
    """The layouts of a batch: padded, and where the models can share prompts."""

    @property
    def needs_reference(self) -> bool:
        """False: no reference is loaded, and `losses` gets None for it."""
        return True

    @property
    def needs_reference_model(self) -> bool:
        """True: `forward` takes more from the reference than the log-probs of the tokens, so that these alone, computed
        beforehand, are not enough."""
        return False

    @property
    def across_pairs(self) -> bool:
        """True: the loss of a pair depends on the others of its batch. A micro-batch is then exactly one per-device
        batch of `per_device_train_batch_size` pairs, in the order of the data."""
        return False

    def losses(self, policy: PairTokens, reference: PairTokens | None, batch: dict[str, Tensor]) -> PairLosses:
        """The losses of the pairs [B], whose mean is trained on, their rewards and what else to log."""
        raise TypeError(f"{type(self).__name__} does not say what its losses are")

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[PairTokens, PairTokens | None]:
        """The tokens of policy and reference: what `losses` gets. Under `torch.no_grad` in evaluations."""
        policy = pair_tokens(model, batch, chunk_size=self.args.chunk_size)
        return policy, self.reference_tokens(batch) if self.needs_reference else None

    masks_turns = False
    """Whether all that the method computes keeps to the masks of answers in which tools speak (`align.data.turns`)."""

    read_rows: Callable[..., Any] | None = None
    """Of a method whose rows are no pairs: rows -> tokenised pairs (`PairData.read`)."""

    def prepare_dataset(self, dataset, name: str):
        """Tokenised pairs -> the same with what the method needs beside them; name: train or eval. Called once per
        dataset, before the columns that are not needed are dropped."""
        return dataset

    # ---- set-up -----------------------------------------------------------------------------------------------------

    def __init__(
        self,
        model: str | Model,
        args: PreferenceConfig | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        ref_model: str | Model | None = None,
        peft_config=None,
        callbacks=None,
        optimizers=(None, None),
        compute_metrics: UserMetrics | None = None,
        quantization_config: Any = None,
    ):
        args = self.options(args, model, train_dataset)
        processing_class = tokenizer_of(args, model, processing_class)
        self.args = args
        if is_stream(train_dataset):
            self._check_stream()
        ref_model = self._reference_given(ref_model)
        options = loading_options(args, model, quantization_config)
        self.check_start = ref_model is None
        data = PairData(
            processing_class,
            args.max_length,
            args.max_bad_share,
            (*self.columns, *self.token_columns),
            further=self.prepare_dataset,
            num_proc=args.dataset_num_proc,
            turns=self.masks_turns,
            read=self.read_rows,
        )
        load = partial(load_trained, args, model, peft_config, options)
        empty, rows = without_weights(args, model), (train_dataset, eval_dataset)
        super().__init__(load, args, data, *rows, callbacks, optimizers, compute_metrics, empty=empty)
        ref_dtype = self._reference_dtype(ref_model)
        ref_model = load_reference(ref_model, self.model, ref_dtype)
        if ref_model is not None:
            self.check_rows_of(language_model(ref_model), "reference")
        models = [self.model] if ref_model is None else [self.model, ref_model]
        self.planner = MicroBatchPlanner(
            self.layout(models),  # before a reference is copied from the policy
            args.train_batch_size,
            args.tokens_per_batch,
            self.columns,
            as_given=self.across_pairs,
        )
        self.reference: Reference | None = None
        self.reference_cache: ReferenceCache | None = None
        self._start: Reference | None = None  # the policy, which is the reference until it is trained
        if self.needs_reference:
            self._set_up_reference(ref_model, ref_dtype)
        self.moving = moving_reference(self)
        show_completions(self, self.eval_dataset)

    def layout(self, models: list[Model]) -> PaddedPairs | SharedPrefixPairs:
        """Of the tokens of batches that these models run on."""
        obstacles = (enable_shared_prefix(m, self.longest_row, autocast_dtype(self.args)) for m in models)
        if not resolve_layout(self.args.batching, obstacles):
            return self.padded(self.data.tokenizer.pad_token_id)
        self.add_callback(CheckSharedRows(self))
        return self.shared()

    def _check_stream(self) -> None:
        """ConfigError where all pairs are needed before the first step."""
        if self.args.precompute_ref_log_probs:
            raise ConfigError(
                "precompute_ref_log_probs is not supported with IterableDataset: it goes through all pairs before "
                "training, and the rows are a stream"
            )
        if type(self).prepare_dataset is not PreferenceTrainer.prepare_dataset:
            raise ConfigError(
                f"{type(self).__name__} computes something for all pairs before training, and the rows are a stream: "
                "load them without streaming"
            )

    def _reference_given(self, ref_model: str | Model | None) -> str | Model | None:
        """The model that is named as the reference, None if none is; ConfigError for options that would be ignored."""
        args = self.args
        if ref_model is not None and args.ref_model_name_or_path is not None:
            raise ConfigError("the reference is named twice, by ref_model and by ref_model_name_or_path")
        ref_model = ref_model or args.ref_model_name_or_path
        if self.needs_reference:
            check_no_noise(args)
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

    def _reference_dtype(self, ref_model: str | Model | None) -> torch.dtype | None:
        """`ref_dtype`; ConfigError where there is no second model whose dtype it could be."""
        if self.args.ref_dtype is None:
            return None
        if not self.needs_reference:
            raise ConfigError("ref_dtype: this loss has no reference", key="ref_dtype")
        if ref_model is None and isinstance(self.model, PeftModel):
            raise ConfigError("ref_dtype: the reference is the policy with its adapter off", key="ref_dtype")
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ConfigError(
                "ref_dtype: a sharded reference has the precision of the policy's shards; leave it out", key="ref_dtype"
            )
        return getattr(torch, self.args.ref_dtype)

    def _set_up_reference(self, ref_model: Model | None, dtype: torch.dtype | None) -> None:
        """Before the first step, while the policy is what it starts as."""
        args, sharded = self.args, self.is_fsdp_enabled or self.is_deepspeed_enabled
        once = args.precompute_ref_log_probs
        reference = self.reference = make_reference(
            self.model, ref_model, for_one_pass=once and not sharded, dtype=dtype
        )
        cache = None
        if reference.model is self.model:
            self._start = reference
        if once:
            if self.is_deepspeed_enabled and self.accelerator.deepspeed_plugin.zero_stage == 3:
                raise ConfigError("precompute_ref_log_probs does not work under ZeRO-3: use fsdp2, or a live reference")
            # where weights are sharded, only the main process may have them all
            mark = weights_mark(reference.model, frozen_only=reference.adapter_off)
            cache = self.reference_cache = ReferenceCache(
                args.ref_log_probs_dir or Path(args.output_dir) / "ref_log_probs",
                shared(mark),
                f"{self.accelerator.mixed_precision} {language_model(self.model).dtype}",
            )
        if once and reference.adapter_off and self.is_fsdp_enabled:
            # the policy is sharded when it is trained: until then only the main process has its weights
            self.reference = Reference(freeze_copy(self.model).unload(), adapter_off=False)
        if self.reference.model is not self.model:
            self.reference.prepare(self.accelerator)
        if cache is not None:
            self.train_dataset = self._with_reference(self.train_dataset, cache, "train", args.train_batch_size)
            self.eval_dataset = of_each(
                self.eval_dataset, lambda pairs: self._with_reference(pairs, cache, "eval", args.eval_batch_size)
            )
            self.reference = reference if reference.adapter_off else None  # its log-probs are on disk

    # ---- the reference ----------------------------------------------------------------------------------------------

    @property
    def ref_model(self) -> Model | None:
        """The reference's own model; None where it is the policy with its adapter off, or where there is none (any
        more), as in TRL."""
        return None if self.reference is None or self.reference.adapter_off else self.reference.model

    @property
    def held_reference(self) -> Reference:
        """`reference` of a method that always has one; TrainingError where it is gone or was never made."""
        if self.reference is None:
            raise TrainingError(f"{type(self).__name__} holds no reference: its log-probs were computed beforehand")
        return self.reference

    def reference_tokens(self, batch: dict[str, Tensor]) -> PairTokens:
        """The reference's tokens of a batch, without gradient: computed, or as they were computed beforehand."""
        if "ref_logps" in batch:
            return cached_tokens(batch)
        with self.phase("reference") if self.model.training else nullcontext():
            return self._live_tokens(batch)

    def _live_tokens(self, batch: dict[str, Tensor]) -> PairTokens:
        return live_tokens(
            self.held_reference, batch, chunk_size=self.args.chunk_size, autocast=self.accelerator.autocast
        )

    def prepare_other(self, dataset):
        dataset = super().prepare_other(dataset)
        if self.reference_cache is None:
            return dataset
        kept = self.reference
        if kept is None and self.state.global_step == 0:
            self.reference = self._start
        try:
            unsharded = self.accelerator.is_fsdp2 and not isinstance(self.model, FSDPModule)  # zeros in some processes
            if self.reference is None or unsharded:
                raise ConfigError(
                    "Cannot compute reference log-probs for a dataset passed to `evaluate` or `predict`: "
                    "precompute_ref_log_probs keeps no reference (with an adapter under FSDP2, none before training); "
                    "pass it as eval_dataset when the trainer is made"
                )
            return self._with_reference(dataset, self.reference_cache, "eval", self.args.eval_batch_size)
        finally:
            self.reference = kept

    def _with_reference(self, dataset: Dataset, cache: ReferenceCache, name: str, batch_size: int) -> Dataset:
        """With the reference's log-probs, from the cache or computed."""
        args = self.args
        pairs, world = args.precompute_ref_batch_size or batch_size, args.world_size

        def compute(shards: ReferenceShards) -> None:
            with tqdm(
                total=len(dataset),
                desc=f"Reference log-probs of the {name} pairs",
                disable=args.disable_tqdm or not self.is_world_process_zero(),
            ) as progress:
                compute_logps(
                    dataset,
                    lambda rows: self.planner.cut(rows, pairs),
                    lambda rows: self._live_tokens(self._prepare_inputs(self.planner.collate(rows))).logps,
                    at_once=64 * pairs * world,
                    rank=args.process_index,
                    world=world,
                    progress=progress,
                    shards=shards,
                )

        return cache.add_to(dataset, name, compute)

    # ---- loss -------------------------------------------------------------------------------------------------------

    def pair_losses(self, model: nn.Module, batch: dict[str, Tensor]) -> RowLosses:
        policy, reference = self.forward(model, batch)
        self.check_same_start(model, policy, reference, lambda: self.forward(model, batch)[0])
        return self.losses(policy, reference, batch)

    def check_same_start(
        self,
        model: nn.Module,
        policy: PairTokens,
        reference: PairTokens | None,
        again: Callable[[], PairTokens],
    ) -> None:
        """In the first step: a TrainingError where the reference is to be the policy and is not. again: computes the
        policy's once more, for one that trains with dropout, which its reference does not have."""
        if self.check_start and model.training and self.untrained and reference is not None:
            if has_dropout(model):
                with without_dropout(model), torch.no_grad():
                    policy = again()
            check_same_start(policy.logps.detach(), reference.logps, policy.mask, self.logp_tolerance)

    @property
    def logp_tolerance(self) -> float:
        models = [self.model] if self.reference is None else [self.model, self.reference.model]
        return max(logp_tolerance(self.accelerator, model) for model in models)

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def further_identity(self) -> dict:
        """With `across_pairs` the pairs of a micro-batch decide the loss, and not the step's alone."""
        pairs = {"per_device_train_batch_size": self.args.per_device_train_batch_size} if self.across_pairs else {}
        return super().further_identity() | pairs | named_reference_identity(self.reference, not self.check_start)

    def extra_state(self) -> dict:
        """What tells the reference of this run from another: its log-probs of fixed tokens, or of the cached ones the
        mark."""
        if self.reference is not None:
            return {"reference": reference_probe(self.reference, self.args.device)}
        return {"reference": None if self.reference_cache is None else self.reference_cache.marks["train"]}

    def save_further_files(self, folder: Path) -> None:
        if self.moving is not None:
            self.moving.save(folder, writes=self.args.should_save)

    def restore_state(self, state: dict) -> None:
        if self.moving is not None and self.resume_folder is not None:
            self.moving.load(self.resume_folder)
        before, now = state["reference"], self.extra_state()["reference"]
        if "reference" in (self.args.resume_changes or []):
            return
        if isinstance(before, Tensor) and isinstance(now, Tensor):
            check_reference(now, before, self.logp_tolerance)
        elif isinstance(before, Tensor) or isinstance(now, Tensor) or before != now:
            raise TrainingError(
                "the pairs or the reference are not those of the run that is resumed: start the trainer with the same "
                "data, model and precompute_ref_log_probs as at first"
            )
