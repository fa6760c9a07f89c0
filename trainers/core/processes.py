"""How the processes of a run were started, and what splits a model over them: what would train something else than the
user asked for, be without effect, or end the run in an error of a library, said before a model is loaded."""

import argparse
import importlib.util
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist
import yaml
from accelerate.commands.config.config_args import default_config_file
from torch import nn

from align.distributed.launchers import COUNTS, OF_A_PROCESS, OF_SLURM
from align.errors import ConfigError, one_line

HOW = "start them with `align launch`, torchrun, or `accelerate launch --multi_gpu --num_processes N`"
# Of `fsdp_config`, what transformers reads for FSDP2.
OF_FSDP = (
    *("version", "auto_wrap_policy", "transformer_layer_cls_to_wrap", "reshard_after_forward", "cpu_offload"),
    *("cpu_ram_efficient_loading", "state_dict_type", "activation_checkpointing"),
)
OF_WHOLE_WEIGHTS = {
    "adafactor": "it adds shards to whole tensors, which torch refuses at the first step",
    "adagrad": "it makes its state before the weights are split, and torch does not find them again",
}
INSTEAD = "adamw_torch, adamw_torch_fused and rmsprop run there"
ADDED = ("min_num_params", "xla", "xla_fsdp_v2", "xla_fsdp_grad_ckpt")
"""What transformers adds to `fsdp_config`, with values that ask for nothing."""
WITHIN = {"tp_size": "tensor", "cp_size": "context", "sp_size": "sequence"}
SIZES = (*WITHIN, "dp_replicate_size", "dp_shard_size")


def check_variables() -> None:
    """ConfigError where the environment says that this is a process of several, and not how to find the others: on
    processors accelerate would wait for them, or end in an error of torch."""
    name, value = next(((name, value) for name, value in _counts().items() if name != OF_SLURM), ("", ""))
    needed: tuple[str, ...] = ("RANK", "MASTER_ADDR") if name == "WORLD_SIZE" else ("MASTER_ADDR",) if name else ()
    if (own := os.environ.get("LOCAL_RANK", "-1")) != "-1":
        name, value, needed = "LOCAL_RANK", own, OF_A_PROCESS
    missing = [needs for needs in needed if needs not in os.environ]
    if missing and not dist.is_initialized():
        raise ConfigError(
            f"{name} is {value} in the environment, as of a process of several, and {', '.join(missing)} not set: for "
            f"a run of one process, unset {name}; for several, {HOW}"
        )


def _counts() -> dict[str, str]:
    """The variables by which launchers say that they have started several processes."""
    found = {name: os.environ.get(name, "") for name in COUNTS}
    return {name: count for name, count in found.items() if count.isdigit() and int(count) > 1}


def check_alone(world_size: int) -> None:
    """ConfigError for a process that was started with others and would train by itself, on all rows: each of them would
    train the same run. world_size: processes of the run, as accelerate has found them."""
    if world_size > 1 or os.environ.get("LOCAL_RANK", "-1") != "-1":
        return
    found = _counts()
    name = next(iter(found), None)
    if dist.is_initialized() and dist.get_world_size() > 1:
        said = f"torch.distributed has {dist.get_world_size()} processes, and LOCAL_RANK is not set"
    elif name is not None:
        said = f"{name} is {found[name]} in the environment, and LOCAL_RANK is not set"
    elif (asked := _asked_of_accelerate()) > 1:
        said = f"accelerate launch was asked for {asked} processes, and has started one, as it does on CPUs"
    else:
        return
    unset = f"; for a run of one process, unset {name}" if name is not None else ""
    raise ConfigError(f"{said}: this process would train by itself, on all rows. For one run of several, {HOW}{unset}")


def _asked_of_accelerate() -> int:
    """How many processes accelerate's launcher was asked for where it starts one program alone. It names that a port
    then, as others may too, so its own words are read."""
    if not {"MASTER_PORT", "ACCELERATE_MIXED_PRECISION"} <= os.environ.keys():
        return 1
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--num_processes", "--num-processes", type=int)
    parser.add_argument("--config_file", "--config-file")
    with suppress(psutil.Error, SystemExit, OSError, yaml.YAMLError, LookupError, TypeError, ValueError):
        words = psutil.Process(os.getppid()).cmdline()
        if not any("accelerate" in word for word in words[:4]):
            return 1
        given, _ = parser.parse_known_args(words)
        if given.num_processes is None:
            return int(yaml.safe_load(Path(given.config_file or default_config_file).read_text())["num_processes"])
        return given.num_processes
    return 1


# ---- what splits a model -------------------------------------------------------------------------------------------


def read_file(args: Any, name: str) -> None:
    """An option that is a mapping or the path of a JSON file, as the mapping. ConfigError for what cannot be read."""
    value = getattr(args, name)
    if not isinstance(value, str) or value.startswith("{"):
        return
    try:
        setattr(args, name, dict(json.loads(Path(value).read_text(encoding="utf-8"))))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{name}: {value} is no file of JSON that can be read: {one_line(error)}", key=name
        ) from error


def check_deepspeed(args: Any) -> None:
    read_file(args, "deepspeed")
    if args.deepspeed and importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "deepspeed: the package is not installed: pip install deepspeed, or use fsdp: true", key="deepspeed"
        )


def check_fsdp_config(args: Any) -> None:
    """ConfigError for entries of `fsdp_config` that nothing would read. Before transformers adds its own."""
    if str(args.fsdp).lower() in ("true", "false"):  # in files and commands: transformers declares the option as text
        args.fsdp = str(args.fsdp).lower() == "true" or None
    read_file(args, "fsdp_config")
    given = args.fsdp_config if isinstance(args.fsdp_config, dict) else {}
    if args.fsdp_config and not args.fsdp:
        raise ConfigError("fsdp_config has no effect without fsdp: true: set it, or leave fsdp_config out", key="fsdp")
    for name, value in given.items():
        entry = name.removeprefix("fsdp_")
        if entry not in OF_FSDP and (value or entry not in ADDED):
            raise ConfigError(
                f"fsdp_config: {name} has no effect with FSDP2 here: leave it out. What it takes: {', '.join(OF_FSDP)}",
                key="fsdp_config",
            )


def check_sharding(args: Any) -> None:
    """ConfigError for what FSDP does not do here, whether `fsdp_config` or accelerate's file asks for it. After
    transformers has read the arguments."""
    if not args.fsdp and not _fsdp_of_launcher():
        return
    if int(_fsdp(args, "version", "FSDP_VERSION", 2 if args.fsdp else 1)) != 2:
        raise ConfigError("fsdp_version: 1: the weights are split by FSDP2 here: write fsdp_version: 2")
    if str(_fsdp(args, "auto_wrap_policy", "FSDP_AUTO_WRAP_POLICY", "")).upper() == "SIZE_BASED_WRAP":
        raise ConfigError(
            "fsdp_auto_wrap_policy: SIZE_BASED_WRAP chooses lists of layers, which FSDP2 cannot split: write "
            "TRANSFORMER_BASED_WRAP"
        )
    if os.environ.get("FSDP_IGNORED_MODULES"):
        raise ConfigError(
            "fsdp_ignored_modules: gradients of weights that FSDP leaves out would not be summed over the processes: "
            "leave it out"
        )


def check_optimizer_of_shards(args: Any) -> None:
    """ConfigError for an optimiser of transformers that does not go with FSDP2. After transformers has read the
    arguments."""
    if not args.fsdp and not _fsdp_of_launcher():
        return
    name, saves = (str(getattr(value, "value", value)) for value in (args.optim, args.save_strategy))
    if name in OF_WHOLE_WEIGHTS:
        raise ConfigError(f"optim: {name} does not run under FSDP2: {OF_WHOLE_WEIGHTS[name]}. {INSTEAD}", key="optim")
    whole = str(_fsdp(args, "state_dict_type", "FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT")).upper() == "FULL_STATE_DICT"
    if name == "sgd" and "momentum=" not in (args.optim_args or "") and saves != "no" and whole:
        raise ConfigError(
            "optim: sgd without momentum has no state, and torch loads none into FSDP2's shards: no checkpoint could "
            "be resumed. Write optim_args: momentum=0.9, fsdp_state_dict_type: SHARDED_STATE_DICT in accelerate's "
            f"file, or save_strategy: 'no'. {INSTEAD}",
            key="optim",
        )


def check_several(args: Any) -> None:
    """ConfigError for one process that is about to train what `fsdp` splits. A dry run, or a server of its completions,
    may be one."""
    if args.fsdp and args.world_size == 1:
        raise ConfigError(f"fsdp splits a model over processes, and this is one: leave fsdp out, or {HOW}", key="fsdp")


def check_layers(args: Any, model: nn.Module) -> None:
    """ConfigError where FSDP is to split a model by layers of a class that it does not have."""
    if not args.fsdp and not _fsdp_of_launcher():
        return
    asked = _fsdp(args, "transformer_layer_cls_to_wrap", "FSDP_TRANSFORMER_CLS_TO_WRAP", None) or []
    has = {type(module).__name__ for module in model.modules()}
    unknown = [name for name in (asked.split(",") if isinstance(asked, str) else asked) if name not in has]
    if unknown:
        own = sorted(has & set(getattr(model, "_no_split_modules", None) or ()))
        raise ConfigError(
            f"fsdp_transformer_layer_cls_to_wrap: the model has no layer of the class {unknown[0]}"
            f"{f'; its layers are {own[0]}' if own else ''}. Without the entry FSDP takes the model's own"
        )


def _fsdp(args: Any, entry: str, variable: str, default: Any) -> Any:
    """An entry of `fsdp_config`, or what accelerate's launcher has made of its file."""
    return args.fsdp_config.get(entry, default) if args.fsdp else os.environ.get(variable, default)


def _fsdp_of_launcher() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def check_parallelism(args: Any) -> None:
    """ConfigError for what splits a matrix or a sequence: the losses, heads and sums of gradients here are of processes
    that each hold whole sequences."""
    if args.parallelism_config is not None:
        sizes = {name: getattr(args.parallelism_config, name) for name in SIZES}
    elif os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "").lower() == "true":
        sizes = {name: int(os.environ.get(f"PARALLELISM_CONFIG_{name.upper()}", "1")) for name in SIZES}
    else:
        return
    split = next((name for name in WITHIN if (sizes[name] or 1) > 1), None)
    if split is not None:
        raise ConfigError(
            f"parallelism_config: {split} {sizes[split]}: there is no {WITHIN[split]} parallelism here: leave it out, "
            "and split the model by FSDP2 (dp_shard_size) or DeepSpeed",
            key="parallelism_config",
        )
    if (sizes["dp_replicate_size"] or 1) > 1 and (sizes["dp_shard_size"] or 1) == 1:
        raise ConfigError(
            "parallelism_config: dp_shard_size 1 splits nothing: leave parallelism_config and FSDP out, and every "
            "process holds the whole model",
            key="parallelism_config",
        )


def check_compiler() -> None:
    """ConfigError for accelerate's compiler, where `torch_compile` is refused."""
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() != "no":
        raise ConfigError(
            f"dynamo_backend: {backend} of accelerate's file compiles the model as torch_compile does, at every step "
            "anew, since batches have other shapes: write 'no'"
        )
