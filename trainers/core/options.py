"""Options of every method whose default follows the machine, or differs from transformers'.

`RunOptions` sits in front of transformers' or TRL's configuration (`class XConfig(RunOptions, TrainingArguments)`), so
that a trainer built on one of TRL's keeps TRL's defaults.
"""

import logging
import os
from dataclasses import MISSING, dataclass, field, fields
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from align.config.early_checks import check_output_dir
from align.config.ranges import check_ranges
from align.config.secrets import Secret, masked
from align.config.sections import plain
from align.config.types import check_options, take_types
from align.errors import AlignError, ConfigError, one_line
from align.trainers.core.early import check_optimizer, check_recomputation, check_schedule, check_workers
from align.trainers.core.hooks import TrainingSettings
from align.trainers.core.processes import (
    check_alone,
    check_compiler,
    check_deepspeed,
    check_fsdp_config,
    check_optimizer_of_shards,
    check_parallelism,
    check_sharding,
    check_variables,
    read_file,
)

logger = logging.getLogger(__name__)

RECOMPUTES = "FSDP_ACTIVATION_CHECKPOINTING"  # of accelerate's launcher
PLACES = ("_dir", "_path", "_token", "run_name", "report_to", "hub_model_id", "disable_tqdm", "use_cpu")
# What transformers, or a trainer, derives from the others or from the machine.
DERIVED = ("accelerator_config", "dataloader_pin_memory", "debug", "do_eval", "remove_unused_columns")
# What makes `--option` without a value mean true to TRL's parser and transformers', which give it to argparse.
FLAG = {"nargs": "?", "const": True}
# Options of transformers that no trainer here can follow, and why.
NOWHERE = {
    **dict.fromkeys(
        ("bf16_full_eval", "fp16_full_eval"),
        "transformers leaves the weights rounded after an evaluation, and these are saved; with bf16 evaluations "
        "compute in bfloat16 as training does",
    ),
    "auto_find_batch_size": "after an out-of-memory error transformers begins again with half the batch, from weights "
    "that are trained in part, and its steps have fewer rows than yours; a smaller per_device_train_batch_size with "
    "more gradient_accumulation_steps trains the same",
    "do_predict": "training predicts nothing; from Python, trainer.predict(rows) does",
    "enable_jit_checkpoint": "a run ends with a checkpoint at SIGTERM and SIGUSR1 by itself, between two steps",
}
# The same of the trainers that build on transformers' Trainer directly.
NOT_IN_OURS = {
    **dict.fromkeys(
        ("include_for_metrics", "batch_eval_metrics", "label_names", "eval_do_concat_batches"),
        "compute_metrics gets the rewards and labels of all rows here, where a method has it",
    ),
    "ddp_static_graph": "DDP adds up the gradients of what a model returns, and the losses here are of states within "
    "it: each process would train weights of its own",
    "length_column_name": "no trainer here sorts rows by length; tokens_per_batch bounds what a pass computes",
    "average_tokens_across_devices": "losses are divided by the counts of all processes, so that they depend on none",
}


def refuse(args: Any, reasons: dict[str, str]) -> None:
    """ConfigError for an option that asks for something else than transformers' default."""
    for item in fields(TrainingArguments):
        neutral = item.default if item.default_factory is MISSING else item.default_factory()
        value = getattr(args, item.name)
        if item.name in reasons and value not in (neutral, None) and (value or neutral):
            raise ConfigError(f"{item.name}: {reasons[item.name]}: leave it out", key=item.name)


def check_batches(accelerator_config: Any) -> None:
    """ConfigError for batches that would not reach all processes, or be of another size than is said."""
    if not accelerator_config.even_batches:
        raise ConfigError(
            "accelerator_config: without even_batches one process has a batch less than the others, which wait for it: "
            "leave it out",
            key="accelerator_config",
        )
    if accelerator_config.split_batches:
        raise ConfigError(
            "accelerator_config: with split_batches per_device_train_batch_size would be of all processes together, "
            "which rollouts, evaluations and the arithmetic of steps do not follow: leave it out, and divide "
            "per_device_train_batch_size by the number of processes",
            key="accelerator_config",
        )


def check_accelerator(args: Any) -> None:
    """ConfigError for entries of `accelerator_config` that accelerate does not have. Before transformers reads it."""
    read_file(args, "accelerator_config")
    if isinstance(args.accelerator_config, dict):
        check_options(AcceleratorConfig, args.accelerator_config, "accelerator_config")


def check_dispatch(args: Any, stream: bool) -> None:
    """No process reads the rows for the others, which ConfigError says to who asks for it. stream: the rows are one."""
    if stream and args.accelerator_config.dispatch_batches:
        raise ConfigError(
            "Iterable datasets require `dispatch_batches=False`: every process reads the whole stream itself and takes "
            "its share of the rows",
            key="accelerator_config",
        )
    if args.accelerator_config.dispatch_batches and isinstance(args, BaseConfig):
        raise ConfigError(
            "accelerator_config: dispatch_batches sends tensors from the first process, and the rows here are no "
            "tensors yet: leave it out",
            key="accelerator_config",
        )
    if stream:
        args.accelerator_config.dispatch_batches = False


def read_given(args: Any) -> None:
    """Values as those of their types, and files as what stands in them."""
    take_types(args)
    args.report_to = args.report_to or ["none"]
    check_variables()
    check_deepspeed(args)
    check_fsdp_config(args)
    check_accelerator(args)
    check_recomputation(args)


def machine_has_cuda() -> bool:
    return torch.cuda.is_available()


def ranks_on_processors() -> None:
    """On a machine without an accelerator, ranks that torchrun has started are those of one run.

    accelerate makes them so if it is told that there are only processors (its own launcher's `--cpu`, `use_cpu`); else
    each rank would be a run by itself, on all of the data.
    """
    if "LOCAL_RANK" in os.environ and not torch.accelerator.is_available():
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")


def take_precision(args: Any) -> None:
    """The mixed precision of a file of accelerate's own, where the run names none. ConfigError where they differ: one
    would be computed in, and what is computed be held to the other."""
    file = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # of the launcher, "no" without a file
    if file not in ("no", "bf16", "fp16"):
        raise ConfigError(f"mixed_precision: {file} of accelerate's file: the trainers here have 'no', bf16 and fp16")
    if file == "no":
        return
    if args.bf16 is None and not args.fp16:
        setattr(args, file, True)
    if not getattr(args, file):
        own = "fp16: true" if args.fp16 else f"bf16: {str(args.bf16).lower()}"
        raise ConfigError(
            f"mixed_precision: {file} of accelerate's file, and {own} here: write {file}: true, or mixed_precision: "
            "'no' there, with which the run decides",
            key=file,
        )


def take_recomputation(args: Any) -> None:
    """FSDP's activation checkpointing, of accelerate's file or of `fsdp_config`, becomes the run's
    `gradient_checkpointing`, which recomputes the same. FSDP's puts every layer in a module whose name comes into those
    of the weights, by which rollout engines do not find them, and transformers refuses the two together."""
    own = args.fsdp_config if isinstance(args.fsdp_config, dict) else {}
    under = {name: os.environ.get(name, "").lower() for name in ("ACCELERATE_USE_FSDP", RECOMPUTES)}
    names = [name for name in own if name.endswith("activation_checkpointing") and own[name]]
    if set(under.values()) != {"true"} and not names:
        return
    os.environ[RECOMPUTES] = "false"
    own.update(dict.fromkeys(names, False))
    args.gradient_checkpointing = True
    logger.info(
        "gradient_checkpointing: true takes the place of FSDP's activation_checkpointing: the same is recomputed"
    )


def limit_waits(seconds: float) -> None:
    """Of the processes' group on processors: transformers gives `ddp_timeout` to that on GPUs alone."""
    if dist.is_initialized() and dist.get_backend() == "gloo":
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))


@dataclass
class RunOptions(TrainingSettings):
    bf16: bool | None = field(
        default=None,
        metadata={"help": "bfloat16 mixed precision. Default: on a GPU that has it, off elsewhere.", **FLAG},
    )
    gradient_checkpointing: bool | None = field(
        default=None,
        metadata={"help": "Recompute activations in the backward pass. Default: on with a GPU, off on a CPU.", **FLAG},
    )
    logging_steps: float = field(default=10, metadata={"help": "Log every so many optimiser steps."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "transformers' hiding of non-finite losses; off here: they are errors."}
    )
    max_bad_share: float = field(
        default=0.0,
        metadata={
            "help": "Share of unusable rows (empty, malformed, too long) that is dropped with a warning; more is an "
            "error."
        },
    )

    verify_saved: bool = field(
        default=True,
        metadata={"help": "Read the model back after the final save and compare it with the one that was trained."},
    )

    resume_changes: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of what may differ from the run that a checkpoint is of, such as learning_rate; everything "
            "else that changes the result must be the same."
        },
    )

    def __post_init__(self):
        read_given(self)
        ranks_on_processors()
        cuda = machine_has_cuda() and not self.use_cpu
        take_precision(self)
        if self.bf16 is None:
            self.bf16 = cuda and not self.fp16 and torch.cuda.is_bf16_supported()
        if self.gradient_checkpointing is None and getattr(self, "activation_checkpointing", None) is None:
            self.gradient_checkpointing = cuda
        take_recomputation(self)
        for name in ("activation_checkpointing", "activation_checkpointing_kwargs"):
            old = name.replace("activation", "gradient")
            if hasattr(self, name) and getattr(self, name) is None:  # transformers 5.23, which warns of the old name
                setattr(self, name, getattr(self, old))
        if not cuda:
            self.dataloader_pin_memory = False
        if self.output_dir is not None:
            check_output_dir(self.output_dir)
        check_ranges(self)
        check_optimizer(self)
        check_workers(self)
        refuse(self, NOWHERE)
        if self.logging_nan_inf_filter:
            raise ConfigError(
                "logging_nan_inf_filter: a loss that is not finite ends the run, which nothing hides: leave it out",
                key="logging_nan_inf_filter",
            )
        if self.bf16 and not self.use_cpu and not torch.accelerator.is_available():
            raise ConfigError(
                "bf16: no GPU is found on this machine. Leave bf16 out (float32), or add use_cpu: true to train in "
                "bfloat16 on its processors",
                key="bf16",
            )
        if self.hub_token is not None:
            self.hub_token = Secret(self.hub_token)
        connected = dist.is_initialized()  # by a program, which has set its own limit
        try:
            super().__post_init__()
        except (ValueError, TypeError, OSError, ImportError) as error:
            if isinstance(error, AlignError):
                raise
            raise ConfigError(one_line(error)) from error
        if self.do_eval and self.eval_strategy == "no" and not self.eval_on_start:
            raise ConfigError(
                "do_eval: nothing is evaluated with eval_strategy: 'no'; set eval_strategy: steps or epoch, or leave "
                "do_eval out",
                key="do_eval",
            )
        if not connected:
            limit_waits(self.ddp_timeout)
        if self.gradient_checkpointing and (self.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            if self.ddp_find_unused_parameters is None:
                # as transformers has it without an adapter: DDP's search and such checkpoints exclude each other
                self.ddp_find_unused_parameters = False
        check_alone(self.world_size)
        check_sharding(self)
        check_optimizer_of_shards(self)
        check_parallelism(self)
        check_batches(self.accelerator_config)
        check_schedule(self)


@dataclass
class BaseConfig(RunOptions, TrainingArguments):
    """Configuration of the trainers that build on transformers' Trainer directly."""

    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "Processes that tokenise the rows, once for all later runs. Default: one."}
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Options of from_pretrained for a model that is passed by name, from Python."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the code that a model brings with it: only of those whose code you know."}
    )
    router_aux_loss_coef: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the load-balancing loss of a mixture of experts. Default: the model's own; 0: none."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.torch_compile:
            raise ConfigError(
                "torch_compile: the head and the attention of these trainers are made anew for every batch (wanted "
                "tokens, shared prompts), so that every step would be compiled again; leave it out. FlexAttention is "
                "compiled by itself on a GPU"
            )
        if self.train_sampling_strategy in ("group_by_length", "batch_rebalance"):
            raise ConfigError(
                f"train_sampling_strategy: {self.train_sampling_strategy} sorts rows of one sequence, and the rows "
                "here are pairs, rankings or prompts: leave it out. tokens_per_batch bounds what a pass computes, by "
                "the rows' lengths",
                key="train_sampling_strategy",
            )
        check_compiler()
        refuse(self, NOT_IN_OURS)
        if self.label_smoothing_factor:
            raise ConfigError(
                "label_smoothing_factor is for token labels: give the pairs of a reward or preference loss a column "
                "chosen_prob, 0.9 where you would have smoothed by 0.1"
            )


def changed_settings(args: TrainingArguments) -> dict:
    """The settings that differ from their defaults, without those that say where something lies or is shown, and
    without those that nobody sets."""
    return {
        f.name: masked(plain(getattr(args, f.name)), f.name)
        for f in fields(args)
        if f.default is not MISSING and getattr(args, f.name) != f.default
        if not f.name.endswith(PLACES) and f.name not in DERIVED
    }
