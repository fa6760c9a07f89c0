"""Wires what every trainer shares (metrics, guards, checkpoints, trackers) into the hooks of transformers' Trainer."""

import logging
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, SupportsFloat, TypeVar

import torch
from accelerate.utils import gather_object
from peft import PeftModel, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from align.config.arguments import init_fields, resume_from
from align.config.early_checks import COMPARED, check_resume_changes
from align.data.endless import EndlessRows
from align.data.limits import fit_sets, reader_of
from align.data.streams import is_stream
from align.data.today import day, set_day, writes_date
from align.distributed.checkpoints import checksums, flush_files, remove_older, surplus, write_manifest
from align.distributed.disk import writing
from align.distributed.fsdp2 import patch_prepare
from align.distributed.ranks import by_first, in_all, shared
from align.distributed.shards import reshard
from align.distributed.shells import check_sharded
from align.errors import ConfigError, DataError, TrainingError
from align.modeling.adapters import adapter_start, check_overlap, notes, split
from align.modeling.dequantize import check_trained_form, told_of_quantised_weights
from align.modeling.load import hold_modules_in_float32
from align.modeling.rotary import LONG, factors_of
from align.modeling.weights_digest import weights_digest
from align.trainers.core import card, guards, identity, saving, trackers
from align.trainers.core.checkpoints import Resumed, choose_checkpoint, layout_of, read_checkpoint, write_extra_state
from align.trainers.core.console import LogFile, replace_printing, show_while_there_are_bars
from align.trainers.core.early import check_early_stopping, check_machine, check_wandb
from align.trainers.core.eval_completions import check_prompts
from align.trainers.core.experts import check_checkpointing, router_coefficient
from align.trainers.core.hooks import check_overridden
from align.trainers.core.hub import PushesToHub
from align.trainers.core.loaders import LoadsRows
from align.trainers.core.lock import holding
from align.trainers.core.options import BaseConfig, RunOptions, check_dispatch
from align.trainers.core.processes import check_layers
from align.trainers.core.recorder import Recorder
from align.trainers.core.resumed import follow, own_settings
from align.trainers.core.signals import REQUEUE, StopOnSignal
from align.trainers.core.sums import sum_gradients
from align.trainers.core.zero import UnderDeepSpeed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

Options = TypeVar("Options", bound=RunOptions)


class TrainerMixin(PushesToHub, UnderDeepSpeed, LoadsRows):
    """In front of a transformers-style trainer: `class XTrainer(TrainerMixin, Trainer)`. A mix-in, so that a trainer
    built on one of TRL's keeps TRL's code."""

    args: RunOptions
    _total_loss_scalar: float  # transformers' sum of the losses of `train`
    # The attribute and the tags of its methods are TRL's, by which the hub finds them.
    _tag_names: ClassVar[list[str]] = ["align"]
    paper: ClassVar[str | None] = None  # of the method, for the model card
    config_class: ClassVar[Any]  # the method's configuration, a RunOptions

    @classmethod
    def options(cls, args: Options | None, model: Any, train_dataset: Any) -> Options:
        """What a trainer is made with: `args`, or the method's defaults, with the output in ./MODEL-METHOD as TRL has
        it. ConfigError without rows."""
        if train_dataset is None:
            raise ConfigError(f"{cls.__name__}: `train_dataset` is required: the rows to train on")
        set_day(None if args is None else shared(by_first(lambda: identity.first_day(args))))
        if args is not None:
            check_machine(args)
            check_dispatch(args, is_stream(train_dataset))
        if is_stream(train_dataset) and (args is None or args.max_steps <= 0):
            raise ConfigError(
                "the rows are a stream, whose end is not known: set max_steps, the number of optimiser steps to train"
            )
        if args is not None:
            return args
        path = model.name_or_path if isinstance(model, PreTrainedModel | PeftModel) else model
        parts = (Path(str(path)).name, cls.__name__.removesuffix("Trainer"))
        return cls.config_class(output_dir="-".join(part for part in parts if part))

    def __init__(self, *args: Any, **kwargs: Any):
        check_overridden(Trainer)
        self.recorder = Recorder()
        self.resumed: Resumed | None = None
        self._verify = self._began = False
        self.disk_errors: saving.DiskErrors | None = None  # of a checkpoint that is written
        self.readers = []
        with told_of_quantised_weights():
            super().__init__(*args, **kwargs)
        check_overlap(self.model)
        if not saving.is_peft(self.model):
            check_trained_form(self.model)
        if self.optimizer is not None:  # the user's: others are made when training begins
            guards.check_given_optimizer(self.model, self.optimizer)
        check_layers(self.args, self.model)
        check_sharded(self.accelerator)
        patch_prepare(self.accelerator)
        sum_gradients(self.accelerator, self.args.accelerator_config.gradient_accumulation_kwargs)
        if isinstance(self.args, BaseConfig):  # TRL's, of SFT, adds the loss of a mixture of experts
            self.router_coefficient = router_coefficient(self.model, self.args.router_aux_loss_coef)
            self.aux_loss_enabled = self.router_coefficient > 0  # TRL's name
            if self.aux_loss_enabled:
                check_checkpointing(self.args)
            if not self.is_deepspeed_enabled:  # which holds float32 copies of what it trains
                hold_modules_in_float32(self.model, autocast=self.accelerator.mixed_precision != "no")
        self._check_rows()
        self._check_sets()
        replace_printing(self)
        self.add_callback(LogFile(type(self).__name__.removesuffix("Trainer"), lambda: self.resume_step))
        if not self.is_deepspeed_enabled:  # its gradients are not in `parameter.grad`
            self.add_callback(guards.GradientsReachTheWeights(lambda: self.model_wrapped))
        self.add_callback(guards.ProcessesAgree(self.accelerator))
        self._signals = StopOnSignal(self.accelerator)
        self.add_callback(self._signals)
        by_first(lambda: saving.check_base(self.model, self.args.output_dir))
        if isinstance(self.model, PreTrainedModel | PeftModel):
            self.model.add_model_tags(self._tag_names)  # for the hub
        self._start_digest = weights_digest(self.model)
        if self.args.data_seed is None:
            # Otherwise accelerate shuffles by torch's current seed, which other code may set, and a resumed run might
            # see other batches.
            self.accelerator.dataloader_config.data_seed = self.args.seed

    def _check_rows(self) -> None:
        """Rows that the model cannot take would end in an index error, or train positions that it does not have."""
        self.check_rows_of(self.model, "model")
        self.check_dropped()

    @property
    def longest_row(self) -> int | None:  # tokens that there may be in a sequence; None: what the rows have
        return vars(self.args).get("max_length")

    def check_rows_of(self, model: nn.Module, name: str) -> None:
        """The same for another model that reads the rows, by its name in the error."""
        fit_sets(model, self.longest_row, self.train_dataset, self.eval_dataset, self.processing_class, name)
        self.readers.append(reader_of(model, name))

    def add_callback(self, callback: Any) -> None:
        check_prompts(callback)
        super().add_callback(callback)
        show_while_there_are_bars(self.callback_handler.callbacks[-1])

    # ---- metrics ----------------------------------------------------------------------------------------------------

    def record(self, name: str, value: SupportsFloat, weight: SupportsFloat = 1.0) -> None:
        self.recorder.record(name, value, weight)

    def phase(self, name: str) -> AbstractContextManager[None]:
        return self.recorder.phase(name)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        step, output_dir = self.state.global_step, self.args.output_dir
        if not any(key.startswith("eval_") for key in logs):
            logs.update(self.summary(self.recorder.take(logs)))
            if "train_loss" in logs:
                logs["train_loss"] = self._mean_loss()
            if self.args.fp16 and not math.isfinite(logs.get("grad_norm", 0.0)):
                del logs["grad_norm"]  # the loss scaler skipped this step and lowers its scale, as it should
        guards.check_metrics(logs, step, output_dir)
        super().log(logs, start_time)
        guards.check_metrics(self.state.log_history[-1], step, output_dir)  # with what TRL has added

    def _mean_loss(self) -> float:
        """Over the steps of this call of `train`, from the sum of their losses, of which the last are this process's
        alone. Older transformers (5.17) divide it by the steps before a checkpoint too, newer (5.24) do not."""
        losses = gather_object([self._total_loss_scalar])
        return sum(losses) / len(losses) / max(1, self.state.global_step - (self.resume_step or 0))

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """What is logged, from the means over all processes since the last log."""
        return means

    def log_table(self, name: str, columns: list[str], rows: list[list]) -> None:
        trackers.log_table(self.args, self.state.global_step, name, columns, rows)

    def log_figure(self, name: str, figure: "Figure") -> None:
        trackers.log_figure(self.args, self.callback_handler.callbacks, self.state.global_step, name, figure)

    # ---- steps ------------------------------------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        return self.state.global_step >= self.state.max_steps

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        if self.finished:  # transformers resumes a finished run with one more step if it ended within an epoch
            return [], None
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        guards.check_trained_tokens(batches, count, self.state.global_step + 1)
        return batches, count

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        with self.phase("train"):
            loss = super().training_step(model, inputs, num_items_in_batch)
        guards.check_loss(loss, self.state.global_step + 1)
        return loss

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def extra_state(self) -> dict:
        """What a method keeps beyond model, optimiser, scheduler and random states: tensors and plain values. A resumed
        run finds it in `resume_state`."""
        return {}

    def save_further_files(self, folder: Path) -> None:
        """Write what else belongs into a checkpoint, e.g. a second model; `resume_folder` has it. Called on all
        processes, as sharded weights need; the main process alone writes."""

    @property
    def resume_state(self) -> dict | None:
        return None if self.resumed is None else self.resumed.state

    @property
    def resume_step(self) -> int | None:
        return None if self.resumed is None else self.resumed.step

    @property
    def resume_folder(self) -> Path | None:
        return None if self.resumed is None else self.resumed.folder

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As transformers' `save_model`; then what was written is read back and compared (`verify_saved`), and is on
        the disk when this returns."""
        self._verify = self.args.verify_saved and not _internal_call
        with nullcontext() if _internal_call else saving.whole_model(self.accelerator):
            super().save_model(output_dir, _internal_call)
        if self.args.should_save and not _internal_call:  # checkpoints have a rule of their own
            folder = output_dir or self.args.output_dir
            with writing(folder):
                flush_files(folder)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:  # transformers 5.23 asks every process, of which some have to help to gather
            super()._save(output_dir, state_dict)
            return
        if self.disk_errors is not None:
            self.disk_errors.keep_any(self._save_checked, output_dir, state_dict)
            return
        with writing(output_dir or self.args.output_dir):
            self._save_checked(output_dir, state_dict)

    def _save_checked(self, output_dir: str | None, state_dict: dict[str, Tensor] | None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        readme = folder / "README.md"
        previous = readme.read_text(encoding="utf-8") if readme.is_file() else None
        # transformers empties what it is given if the model was made from a config
        trained = dict(state_dict) if self._verify and state_dict is not None else None
        super()._save(output_dir, state_dict)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if not isinstance(model, PreTrainedModel | PeftModel):
            return
        saving.finish_folder(folder, model, self.processing_class)
        base = adapter_start(folder) if saving.is_peft(model) else model.config.name_or_path
        tags = model.model_tags or []
        card.write_card(folder, previous, card.facts_of(self), base=base, adapter=saving.is_peft(model), tags=tags)
        if self._verify:
            saving.verify_saved(folder, model, model.state_dict() if trained is None else trained)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._load_stacked(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        new_rate = identity.learning_rate_of(checkpoint) not in (None, self.args.learning_rate)
        # DeepSpeed has loaded them with the weights
        with nullcontext() if self.is_deepspeed_enabled else own_settings(self.optimizer, rate=new_rate):
            super()._load_optimizer_and_scheduler(checkpoint)
        follow(self.lr_scheduler)

    def _load_best_model(self) -> None:
        reshard(self.model_wrapped)  # after an evaluation, whose gathered weights cannot be loaded into
        if not self._load_stacked(self.state.best_model_checkpoint):
            super()._load_best_model()

    def _load_stacked(self, folder: str) -> bool:
        """Whether the folder holds an adapter that was trained on another one: then what was trained is loaded."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or "start_rank" not in notes(folder):
            return False
        set_peft_model_state_dict(self.accelerator.unwrap_model(self.model), split(folder)[1])
        return True

    def further_facts(self) -> dict[str, str]:
        """What the model card says of a method beside what it says of all, such as its rewards."""
        return {}

    def identity(self) -> dict:
        """What decides the result of this run (align.trainers.core.identity); a resumed run must have the same."""
        return {
            "method": type(self).__name__.removesuffix("Trainer"),
            "model": self._start_digest,
            "adapter": identity.adapter_settings(self.accelerator.unwrap_model(self.model, keep_torch_compile=False)),
            "data": identity.data_digest(self.train_dataset),
            "settings": identity.settings_of(self.args),
            identity.TEMPLATE_DATE: str(day()) if writes_date(self.processing_class) else None,
            "code": identity.code_marks(self.own_parts()),
            **({} if factors_of(self.model) != LONG else {"rope_factors": LONG}),
            **self.further_identity(),
        }

    def further_identity(self) -> dict:
        """What else of a method decides the result, such as its rewards: plain values by name."""
        return {}

    @property
    def _place(self) -> dict[str, int]:
        """Of this process in the run."""
        return {"rank": self.args.process_index, "processes": self.args.world_size}

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with writing(Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"):
            self._write_checkpoint(model, trial)

    def _write_checkpoint(self, model: nn.Module, trial: Any) -> None:
        args, step = self.args, self.state.global_step
        in_all(lambda: guards.check_weights(self.model.parameters(), step))  # of which each may have a shard
        run_dir = self._get_output_dir(trial=trial)
        folder = Path(run_dir) / f"checkpoint-{step}"
        saving.begin_folder(self, folder)
        with saving.declared_later(args) as (limit, push), saving.errors_kept(self, folder) as errors:
            errors.keep(super()._save_checkpoint, model, trial)
            state = self.extra_state()
            errors.keep_any(write_extra_state, folder, state, model_only=args.save_only_model, **self._place)
            errors.keep_any(self.save_further_files, folder)
            if args.should_save:
                errors.keep_any(identity.write_identity, folder, self._identity | trackers.run_in_wandb(args))
        errors.raise_in_all()
        rotated = run_dir, step, limit, self.state.best_model_checkpoint
        # with a limit of 1 transformers deletes the last one when training ends, and the best alone is left
        flushed = shared(by_first(lambda: limit == 1 or bool(surplus(*rotated))))
        share = writing(folder)(partial(checksums, folder, flushed=flushed, **self._place))
        shares = gather_object([in_all(share)])
        if args.should_save:
            errors.keep_any(write_manifest, folder, {name: entry for share in shares for name, entry in share.items()})
        errors.raise_in_all()
        if args.should_save:
            remove_older(*rotated)
        if push:
            self._push_from_checkpoint(str(folder))
        self.accelerator.wait_for_everyone()

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As transformers' `train`; `resume_from_checkpoint=True` takes the newest undamaged checkpoint, "auto" that if
        there is one. None: what the configuration says, which transformers leaves to the script."""
        args = self.args
        if resume_from_checkpoint is None:
            resume_from_checkpoint = resume_from(args.resume_from_checkpoint)
        check_wandb(args)
        check_early_stopping(args, self.callback_handler.callbacks)
        self.check_best_metric(self.evaluation_metrics())
        self._identity = self.identity()
        if isinstance(self.train_dataset, EndlessRows) and len(set(gather_object([self._identity["data"]]))) > 1:
            raise DataError("the processes read the stream in different orders: give its shuffle a seed")
        checkpoint = choose_checkpoint(
            resume_from_checkpoint, args.output_dir, self._identity, args.resume_changes or [], layout_of(self)
        )
        options: Any = type(args)
        check_resume_changes(args.resume_changes, {*init_fields(options), *COMPARED, *identity.names_in(checkpoint)})
        self.resumed = None
        if checkpoint is not None:
            self.resumed = in_all(partial(read_checkpoint, checkpoint, **self._place))
        eval_on_start = args.eval_on_start
        # The evaluation at a checkpoint's step was made before the checkpoint was, if one was due.
        args.eval_on_start = eval_on_start and checkpoint is None
        try:
            with ExitStack() as held:
                held.enter_context(trackers.own_run(args, first=not self._began, checkpoint=checkpoint))
                self._began = True
                by_first(lambda: held.enter_context(holding(args.output_dir, anew=checkpoint is None)))
                output = super().train(resume_from_checkpoint=checkpoint, **kwargs)
        finally:
            args.eval_on_start = eval_on_start
            self._signals.release(args)
        if self._signals.stopped and not self.finished:
            raise SystemExit(REQUEUE)
        if self.state.global_step == (self.resume_step or 0):
            if (checkpoint is None or not self.finished) and not isinstance(self.train_dataset, EndlessRows):
                raise TrainingError(
                    f"no step was trained after step {self.state.global_step} of {self.state.max_steps}: "
                    f"{len(self.train_dataset)} training rows do not reach one more batch"
                )
            logger.warning("%s is finished already: no step was left to train", checkpoint)
        return output._replace(training_loss=output.metrics["train_loss"])
