"""What would end a run after its model is loaded and its rows are tokenised, or be without effect, said before that."""

import importlib.util
import inspect
import os
from typing import Any

import torch
from huggingface_hub import HfApi, get_token, is_offline_mode
from transformers import EarlyStoppingCallback, get_scheduler
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from align.errors import ConfigError, one_line
from align.trainers.core.processes import check_several

# Optimisers of transformers that read no `optim_args`.
WITHOUT_ARGUMENTS = (
    *("adafactor", "adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused"),
    *("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"),
    *("lion_8bit", "lion_32bit", "paged_lion_8bit", "paged_lion_32bit"),
)
# What an optimiser's name has in it, and the package that it is in.
PACKAGES = {
    **{"adamw_torch_4bit": "torchao", "adamw_torch_8bit": "torchao", "schedule_free": "schedulefree"},
    **{"galore": "galore_torch", "apollo": "apollo_torch", "lomo": "lomo_optim", "adalomo": "lomo_optim"},
    **{"grokadamw": "grokadamw", "stable_adamw": "optimi", "adamw_anyprecision": "torchdistx"},
    **dict.fromkeys(("_8bit", "bnb", "paged", "lion", "ademamix"), "bitsandbytes"),
}
UNLISTED = ("azure_ml", "flyte")
"""Trackers that transformers does not name among those that are installed."""
WITHOUT_OPTIONS = ("constant", "constant_with_warmup")
"""Schedules to which transformers gives none of `lr_scheduler_kwargs`."""


def check_optimizer(args: Any) -> None:
    """ConfigError for options of optimisers that the chosen one does not read, of which transformers says nothing."""
    name = _name(args.optim)
    if args.optim_args and name in WITHOUT_ARGUMENTS:
        raise ConfigError(
            f"optim_args: {name} reads none of them; its options are learning_rate, weight_decay, adam_beta1, "
            "adam_beta2 and adam_epsilon",
            key="optim_args",
        )
    if args.optim_target_modules is not None and not name.startswith(("galore", "apollo")):
        raise ConfigError(
            f"optim_target_modules: {name} has the same rule for all weights; only galore and apollo read it",
            key="optim_target_modules",
        )


def check_schedule(args: Any) -> None:
    """ConfigError for options that the schedule does not take or cannot do without, which would end the run when the
    schedule is made, and for those that it would not read. After transformers has read the arguments."""
    name, options = _name(args.lr_scheduler_type), dict(args.lr_scheduler_kwargs or {})
    if name == "constant" and args.warmup_steps:
        raise ConfigError(
            f"warmup_steps: {args.warmup_steps} has no effect with lr_scheduler_type: constant, which has no warm-up. "
            "Write lr_scheduler_type: constant_with_warmup, or warmup_steps: 0",
            key="warmup_steps",
        )
    if name in WITHOUT_OPTIONS and options:
        raise ConfigError(f"lr_scheduler_kwargs: {name} has no options: leave it out", key="lr_scheduler_kwargs")
    try:
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)
        steps = args.max_steps if args.max_steps > 0 else 1
        get_scheduler(name, optimizer, args.get_warmup_steps(steps), steps, options)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        given = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[args.lr_scheduler_type]).parameters
        own = [n for n in given if n not in ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")]
        raise ConfigError(
            f"lr_scheduler_kwargs: {options} are not what the schedule {name} takes: {str(error).strip()}. Its "
            f"options: {', '.join(own) or 'none'}",
            key="lr_scheduler_kwargs",
        ) from error


def check_workers(args: Any) -> None:
    """ConfigError for what the loader of batches refuses when training begins."""
    if args.dataloader_persistent_workers and not args.dataloader_num_workers:
        raise ConfigError(
            "dataloader_persistent_workers: there are no workers to keep: set dataloader_num_workers, or leave it out",
            key="dataloader_persistent_workers",
        )
    if args.dataloader_multiprocessing_context is not None and not args.dataloader_num_workers:
        raise ConfigError(
            "dataloader_multiprocessing_context: there are no workers: set dataloader_num_workers, or leave it out",
            key="dataloader_multiprocessing_context",
        )


def check_recomputation(args: Any) -> None:
    """ConfigError for what torch's checkpoints do not take, which ends the run in the first backward pass."""
    valid: dict[str, type] = {"use_reentrant": bool, "preserve_rng_state": bool, "debug": bool, "early_stop": bool}
    valid |= {"determinism_check": str, "context_fn": object}
    for name, value in (args.gradient_checkpointing_kwargs or {}).items():
        if name not in valid:
            raise ConfigError(
                f"gradient_checkpointing_kwargs: unknown key {name}; valid: {', '.join(valid)}",
                key="gradient_checkpointing_kwargs",
            )
        if not isinstance(value, valid[name]):
            kind = "True or False" if valid[name] is bool else "text"
            raise ConfigError(
                f"gradient_checkpointing_kwargs: {name} must be {kind}, got {value!r:.40} ({type(value).__name__})",
                key="gradient_checkpointing_kwargs",
            )


def check_early_stopping(args: Any, callbacks: list) -> None:
    """ConfigError for transformers' callback where it has nothing to look at, of which it has an AssertionError."""
    if not any(isinstance(one, EarlyStoppingCallback) for one in callbacks):
        return
    if args.metric_for_best_model is None or _name(args.eval_strategy) == "no":
        raise ConfigError(
            "EarlyStoppingCallback stops by metric_for_best_model (eval_loss, for example) of evaluations: set it, and "
            "eval_strategy",
            key="metric_for_best_model",
        )


def check_machine(args: Any) -> None:
    """ConfigError where this machine, on which the run is about to train, lacks what it asks for."""
    if args.fp16 and (args.use_cpu or not torch.accelerator.is_available()):
        raise ConfigError(
            "fp16: accelerate has none on processors and would train in float32: leave it out, or use bf16", key="fp16"
        )
    check_several(args)
    optimizer = _name(args.optim)
    package = next((package for part, package in PACKAGES.items() if part in optimizer), None)
    if package is not None:
        _check_installed(package, "optim", optimizer)
    if args.use_liger_kernel:
        _check_installed("liger_kernel", "use_liger_kernel", "true")
    _check_trackers(args.report_to)
    if args.push_to_hub and args.process_index == 0:
        _check_hub(args.hub_token)


def _check_installed(package: str, option: str, value: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"{option}: {value} needs the package {package.replace('_', '-')}, which is not installed: install it, or "
            "leave the option out",
            key=option,
        )


def _check_trackers(names: list[str]) -> None:
    installed = get_available_reporting_integrations()
    for name in names:
        if name not in installed and name not in UNLISTED:
            problem = "is not installed" if name in INTEGRATION_TO_CALLBACK else "is no tracker of transformers"
            raise ConfigError(
                f"report_to: {name} {problem}. Installed here: {', '.join(installed)}; none: report to no tracker",
                key="report_to",
            )


def check_wandb(args: Any) -> None:
    """ConfigError where wandb's server does not take a run, unless it is written to a folder alone or is open."""
    if "wandb" not in args.report_to or args.process_index != 0:
        return
    import wandb

    if wandb.run is not None or os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return
    try:
        wandb.login()
    except wandb.Error as error:
        raise ConfigError(
            f"report_to: wandb does not take this run: {str(error).strip()} With WANDB_MODE=offline in the environment "
            "it is written to the folder wandb, which `wandb sync` sends later",
            key="report_to",
        ) from error


def _check_hub(token: str | None) -> None:
    """Whether the hub knows who pushes."""
    later = "leave it out, and run `hf upload NAME OUTPUT_DIR` when the model is trained"
    if is_offline_mode():
        raise ConfigError(
            f"push_to_hub: HF_HUB_OFFLINE is set, with which nothing is pushed: {later}", key="push_to_hub"
        )
    if not (token or get_token()):
        raise ConfigError(
            f"push_to_hub: there is no token for the hub: run `hf auth login`, set HF_TOKEN, or {later}",
            key="push_to_hub",
        )
    try:
        HfApi(token=token).whoami()
    except Exception as error:  # httpx's among them, which are no OSErrors
        raise ConfigError(
            f"push_to_hub: the hub does not answer: {one_line(error)}; {later}", key="push_to_hub"
        ) from error


def _name(value: Any) -> str:
    return str(getattr(value, "value", value))
