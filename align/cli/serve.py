"""`align serve`: a vLLM server that makes the completions of a run, or a reward, on other GPUs or another machine."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.config.server_key import KEY_FILE, KEY_VARIABLE, own_key

if TYPE_CHECKING:
    from align.config.resolve import RunConfig
    from align.rollout.options import RolloutOptions

FROM_FILE = "the file's, else"  # where an option that is left out comes from
GPU_MEMORY = 0.9

HELP = "start a vLLM server that makes the completions of a run, or a server of a reward"
DESCRIPTION = (
    "Start a vLLM server for the completions of an on-policy run, with model, lengths and dtype of its config file. "
    "The weights come from the run, when it starts. Further options follow the file, as in `align <method>`. With "
    "--reward, start a server of a reward instead, which runs ask by {type: remote}."
)
START_SECONDS = 600.0
OF_VLLM = ("method", "tensor_parallel", "gpu_memory", "kv_cache_gib", "start_timeout")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("config", metavar="CONFIG", nargs="?", help="the run's YAML file")
    add("--reward", metavar="REWARD", help="serve this: a folder, file.py:function, '{type: ...}' ...")
    add("--method", help="the method, for a file that does not name it")
    add("--host", default="127.0.0.1", help="address to listen on [127.0.0.1: this machine alone]")
    add("--port", type=int, default=8000, help="port to listen on [8000]")
    add("--api-key-env", metavar="NAME", help=f"variable with the key [{FROM_FILE} {KEY_VARIABLE}]")
    add(
        "--api-key-file",
        metavar="FILE",
        help=f"else the file with the key, made if it is absent [{FROM_FILE} {KEY_FILE}]",
    )
    add("--tensor-parallel", type=int, metavar="N", help="GPUs that share the model [1]")
    add("--gpu-memory", type=float, metavar="SHARE", help=f"of the GPU's memory for vLLM [{FROM_FILE} {GPU_MEMORY}]")
    add("--kv-cache-gib", type=float, metavar="GIB", help=f"size of the key-value cache [{FROM_FILE} computed]")
    add("--start-timeout", type=float, metavar="SECONDS", help="after which the start has failed [600]")


def run(args: argparse.Namespace, extra: list[str]) -> int:
    from align.cli import build
    from align.cli.launch import method_of
    from align.config.resolve import resolve
    from align.distributed.launchers import forget
    from align.errors import ConfigError
    from align.rollout.make import check_backend
    from align.rollout.server.launch import address, check_free, prepare, serve

    if args.reward is not None:
        return run_reward(args, extra)
    if args.config is None:
        raise ConfigError("name the run's YAML file, or a reward by --reward")
    _check_ranges(args)
    check_backend("vllm")
    check_free(args.host, args.port)
    prepare()  # before torch is loaded
    forget()
    run = resolve(method_of(args), args.config, extra)
    if run.method.data != "prompts":
        raise ConfigError(f"`align {run.method.name}` makes no completions: there is nothing to serve")
    model, options = skeleton(run), started_with(run.training.rollout, args)
    variable, file = options.pop("api_key_env"), options.pop("api_key_file")
    place = Path(file or KEY_FILE).expanduser()
    serve(
        model,
        own_key(variable, file),
        host=args.host,
        port=args.port,
        dtype=dtype(run),
        ready=f"serving at {address(args.host, args.port)}; the key is in ${variable} or {place}",
        start_seconds=args.start_timeout or START_SECONDS,
        tensor_parallel_size=args.tensor_parallel or 1,
        max_model_len=build.longest_sequence(run, model),
        max_num_seqs=run.training.rollout.max_num_seqs,
        **options,
    )
    return 0


def _check_ranges(args: argparse.Namespace) -> None:
    """Raises `ConfigError` for a number that the file would not take either, or that would count as left out."""
    from align.errors import ConfigError

    inf = float("inf")
    for name, least, most in (
        ("tensor_parallel", 1, inf),
        ("gpu_memory", 0, 1),
        ("kv_cache_gib", 0, inf),
        ("start_timeout", 0, inf),
    ):
        value = getattr(args, name)
        if value is not None and not (least <= value <= most and 0 < value < inf):
            limits = f"is at least {least}" if least else f"is above 0{'' if most == inf else f', and at most {most}'}"
            raise ConfigError(f"--{name.replace('_', '-')} {limits}, not {value:g}")


def run_reward(args: argparse.Namespace, extra: list[str]) -> int:
    from align.errors import ConfigError
    from align.evaluation.scoring import reward_specs
    from align.reward_models.build import build_reward
    from align.reward_models.server import serve
    from align.rollout.server.launch import address, check_free

    others = [f"--{name.replace('_', '-')}" for name in OF_VLLM if getattr(args, name) is not None]
    others += extra if args.config is None else [args.config, *extra]
    if others:
        raise ConfigError(f"{others[0]} is for servers of completions, and --reward serves a reward: leave it out")
    specs = reward_specs(args.reward)
    if len(specs) != 1:
        raise ConfigError(f"{args.reward} has {len(specs)} rewards, and a server has one: write it as '{{type: ...}}'")
    check_free(args.host, args.port)
    variable, file = args.api_key_env or KEY_VARIABLE, args.api_key_file
    key, place = own_key(variable, file), Path(file or KEY_FILE).expanduser()
    reward = build_reward(specs[0])
    where = f"reward {reward.name!r} at {address(args.host, args.port)}"
    serve(reward, key, args.host, args.port, f"serving {where}; the key is in ${variable} or {place}")
    return 0


def started_with(section: "RolloutOptions", args: argparse.Namespace) -> dict[str, Any]:
    """The server's own options: of the command line, else as the file's section `rollout` sets them."""
    given = section.given()
    found = {
        "api_key_env": args.api_key_env or given.get("api_key_env", KEY_VARIABLE),
        "api_key_file": args.api_key_file or given.get("api_key_file"),
        "kv_cache_gib": given.get("kv_cache_gib") if args.kv_cache_gib is None else args.kv_cache_gib,
        "gpu_memory_utilization": given.get("gpu_memory_utilization", GPU_MEMORY),
        "further": given.get("engine_options", {}),
    }
    return found if args.gpu_memory is None else {**found, "gpu_memory_utilization": args.gpu_memory}


def skeleton(run: "RunConfig"):
    """The model of a run, without its weights."""
    import torch

    from align.cli import build
    from align.modeling.load import load_policy

    with torch.device("meta"):
        return load_policy(build.empty_model(run), peft_config=build.peft_config(run))


def dtype(run: "RunConfig"):
    """What the engine of the run computes in: as it says, else what the policy does."""
    import torch

    from align.cli import build

    named = run.training.rollout.dtype or (
        "bfloat16" if run.training.bf16 else "float16" if run.training.fp16 else None
    )
    named = named or build.dtype(run)
    return build.model_config(run).dtype or torch.float32 if named == "auto" else getattr(torch, named)
