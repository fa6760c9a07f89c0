"""`align launch`: one run on several processes, GPUs or machines. Starts accelerate's launcher, adds nothing to it."""

import argparse
import importlib.util
import os
import shlex
import sys
from pathlib import Path

from align.cli.serve import START_SECONDS
from align.config.secrets import masked_tokens
from align.errors import ConfigError
from align.methods import get_method

HELP = "run a config on several processes, GPUs or machines"
DESCRIPTION = (
    "Run a config file on several processes, GPUs or machines, or write the SLURM batch file that does. The method is "
    "the file's `method:`. Every option that is not listed here goes to the run, as in `align <method>`; they follow "
    "the file: align launch configs/sft.yaml --setup fsdp2 --num-processes 8 --learning_rate 1e-5"
)
SETUPS = ("ddp", "fsdp2", "zero2", "zero3")
DEFAULTS = {"main_port": 29500, "rollout_tensor_parallel": 1, "rollout_port": 8000, "cpus_per_process": 8}
PARTNERS = {  # an option, and what it does nothing without
    "rollout_tensor_parallel": "--rollout-gpus",
    "rollout_port": "--rollout-gpus",
    "rollout_start_timeout": "--rollout-gpus",
    "node_addresses": "--rollout-gpus",
    "cpus_per_process": "--slurm",
}
OF_THE_JOB = ("node_rank", "main_address", "main_port", "node_addresses")  # which the batch file finds for itself
OF_SEVERAL = ("node_rank", "main_address", "node_addresses")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="the run's YAML file")
    parser.add_argument("--method", help="the method, for a file that does not name it")
    parser.add_argument(
        "--setup", default="ddp", choices=SETUPS, help="a file of configs/accelerate: how memory is split [ddp]"
    )
    parser.add_argument(
        "--num-processes", type=int, metavar="N", help="processes of all nodes together [the GPUs of this machine]"
    )
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="number of machines [1]")
    parser.add_argument("--node-rank", type=int, metavar="R", help="which of the machines this is, from 0")
    parser.add_argument("--main-address", metavar="HOST", help="address of machine 0")
    parser.add_argument("--main-port", type=int, metavar="PORT", help="a free port of machine 0 [29500]")
    parser.add_argument("--cpu", action="store_true", help="train on the CPU (gloo); ddp only")
    parser.add_argument(
        "--rollout-gpus", type=int, metavar="N", help="GPUs of each machine for vLLM servers that make the completions"
    )
    parser.add_argument(
        "--rollout-tensor-parallel", type=int, metavar="N", help="of these, GPUs that one server has [1]"
    )
    parser.add_argument("--rollout-port", type=int, metavar="PORT", help="of a machine's first server [8000]")
    parser.add_argument(
        "--rollout-start-timeout", type=float, metavar="SECONDS", help="after which a server's start has failed [600]"
    )
    parser.add_argument("--node-addresses", metavar="A,B", help="of all machines, where they have servers")
    parser.add_argument("--slurm", metavar="FILE", help="write a SLURM batch file and run nothing")
    parser.add_argument("--cpus-per-process", type=int, metavar="N", help="for the SLURM batch file [8]")
    parser.add_argument("--dry-run", action="store_true", help="print the exact command and run nothing")


def run(args: argparse.Namespace, extra: list[str]) -> int:
    from align.config.resolve import read_entries

    files = [token for token in extra if token.endswith((".yaml", ".yml")) and Path(token).is_file()]
    if files and not Path(args.config).exists():  # the value of an option before the file was taken for the file
        raise ConfigError(f"write the run's options after the config file: align launch {files[0]} --OPTION VALUE ...")
    own = {_flag(name) for name in vars(args)}
    for word in (token.partition("=")[0] for token in extra):
        if "_" in word and word.replace("_", "-") in own:  # as accelerate and torchrun take them
            raise ConfigError(f"{word} is {word.replace('_', '-')} here")
    method = method_of(args)
    _check(args)
    num_processes = args.num_processes or _count_gpus() - (args.rollout_gpus or 0)
    if num_processes < 1:
        raise ConfigError(f"--rollout-gpus {args.rollout_gpus} leaves none of the {_count_gpus()} GPUs to train on")
    if num_processes % args.nodes:
        raise ConfigError(f"--num-processes is the total, and {num_processes} do not divide over {args.nodes} nodes")
    servers = ["--rollout.backend", "server", "--rollout.urls", "http://127.0.0.1"] if args.rollout_gpus else []
    read_entries(get_method(method), args.config, [*extra, *servers])  # now, not when a cluster starts the job
    training = ["align", method, "--config", args.config, *extra, *(["--use_cpu", "true"] if args.cpu else [])]
    if args.slurm:
        if masked_tokens(training) != training:
            raise ConfigError("the batch file would hold a secret: give it as '${NAME}', and export NAME in the job")
        return _write_slurm(args, method, num_processes, training)
    if args.rollout_gpus:
        return _with_servers(args, num_processes, training, extra)
    command = _command(args, num_processes, training)
    if args.dry_run:
        print(shlex.join(masked_tokens(command)))
        _name_plan(training, num_processes)
        return 0
    here = num_processes // args.nodes
    if not args.cpu and (found := _count_gpus()) < here:
        raise ConfigError(f"{here} processes need {here} GPUs of this machine, which shows {found}")
    sys.stdout.flush()
    # The launcher takes the place of this process, so that it gets the signals that the job's owner sends.
    os.execv(command[0], command)


def _with_servers(args: argparse.Namespace, num_processes: int, training: list[str], extra: list[str]) -> int:
    from align.cli import with_servers

    named, section = with_servers.placed(args, extra)
    trainers = num_processes // args.nodes
    gpus = with_servers.devices(args, trainers)
    before = with_servers.servers(args, [*extra, *named], gpus[trainers:])
    own = {} if args.cpu else {"CUDA_VISIBLE_DEVICES": ",".join(gpus[:trainers])}
    trainer = with_servers.Started(_command(args, num_processes, [*training, *named]), own)
    if not args.dry_run:
        again, start = section.on_engine_failure == "wait", args.rollout_start_timeout or START_SECONDS
        return with_servers.supervise(before, trainer, again=again, start=start)
    for one in (*before, trainer):
        print(one.shown())
    _name_plan([*training, *named], num_processes)
    return 0


def _name_plan(training: list[str], num_processes: int) -> None:
    plan = [*masked_tokens(training), "--processes", str(num_processes), "--dry-run"]
    print(f"what it trains on, and the memory of a process: {shlex.join(plan)}", file=sys.stderr)


def _command(args: argparse.Namespace, num_processes: int, training: list[str]) -> list[str]:
    machines = []
    if args.nodes > 1:
        machines = ["--machine_rank", str(args.node_rank), "--main_process_ip", args.main_address]
    machines += ["--main_process_port", str(args.main_port)]
    return [sys.executable, *_launcher(args, num_processes), *machines, "--module", *training]


def _launcher(args: argparse.Namespace, num_processes: int) -> list[str]:
    from align.config import configs_dir

    setup = str(configs_dir() / "accelerate" / f"{args.setup}.yaml")
    counts = ["--num_processes", str(num_processes), "--num_machines", str(args.nodes)]
    return ["-m", "align.cli.launcher", "--config_file", setup, *counts]


def method_of(args: argparse.Namespace) -> str:
    from align.config.source import read_file

    stated = read_file(args.config).get("method")
    name = args.method or (stated.value if stated else None)
    if name is None:
        raise ConfigError(f"{args.config} does not name its method: add a line such as `method: sft`, or give --method")
    if stated and stated.value != name:
        raise ConfigError(f"{stated.where}: the file is for {stated.value!r}, --method says {name!r}")
    return get_method(name).name


def _check(args: argparse.Namespace) -> None:
    """Raises `ConfigError` for what does not go together, and sets the defaults of what was left out."""
    if args.num_processes is not None and args.num_processes < 1 or args.nodes < 1:
        raise ConfigError("--num-processes and --nodes count from 1")
    if args.cpu and args.setup != "ddp":
        raise ConfigError(f"--cpu runs with --setup ddp only, not {args.setup}")
    if (args.cpu or args.slurm or args.nodes > 1) and args.num_processes is None:
        raise ConfigError("give --num-processes, the total over all nodes, with --cpu, --slurm or several --nodes")
    if args.nodes > 1 and not args.slurm and (args.node_rank is None or args.main_address is None):
        raise ConfigError("several --nodes need --node-rank and --main-address on each, or --slurm FILE")
    if args.node_rank is not None and not 0 <= args.node_rank < args.nodes:
        raise ConfigError(f"--node-rank goes from 0 to {args.nodes - 1} for {args.nodes} node(s), not {args.node_rank}")
    _check_partners(args)
    for name, value in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    _check_ranges(args)
    if args.rollout_gpus is not None:
        from align.cli.with_servers import check

        check(args, get_method(method_of(args)))
    if args.setup.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            f"--setup {args.setup} needs DeepSpeed, which is not installed: pip install deepspeed, or use --setup fsdp2"
        )


def _check_partners(args: argparse.Namespace) -> None:
    """No option is accepted and then unused."""
    for name, partner in PARTNERS.items():
        if getattr(args, name) is not None and getattr(args, _attribute(partner)) is None:
            raise ConfigError(f"{_flag(name)} does nothing without {partner}: leave it out")
    for name in OF_THE_JOB if args.slurm else ():
        if getattr(args, name) is not None:
            raise ConfigError(f"{_flag(name)} is found by the batch file in its job: leave it out with --slurm")
    for name in OF_SEVERAL if args.nodes == 1 else ():
        if getattr(args, name) is not None:
            raise ConfigError(f"{_flag(name)} is for several --nodes: leave it out on one")


def _check_ranges(args: argparse.Namespace) -> None:
    last = args.rollout_port + (args.rollout_gpus or 1) - 1
    for flag, low, high in (
        ("--main-port", args.main_port, args.main_port),
        ("--rollout-port", args.rollout_port, last),
    ):
        if not 0 < low <= high < 1 << 16:
            raise ConfigError(f"{flag} {low}: ports go from 1 to 65535")
    if args.rollout_start_timeout is not None and not 0 < args.rollout_start_timeout < float("inf"):
        raise ConfigError(f"--rollout-start-timeout is a number of seconds above 0, not {args.rollout_start_timeout:g}")
    if args.cpus_per_process < 1:
        raise ConfigError(f"--cpus-per-process counts from 1, not {args.cpus_per_process}")


def _attribute(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _count_gpus() -> int:
    import torch

    count = torch.cuda.device_count()
    if count == 0:
        raise ConfigError("no GPU is found on this machine: add --cpu and --num-processes N to train on its processors")
    return count


def _write_slurm(args: argparse.Namespace, method: str, num_processes: int, training: list[str]) -> int:
    import jinja2

    from align.config import configs_dir

    if not any(token.startswith(("--resume_from_checkpoint", "--resume-from-checkpoint")) for token in training):
        training = [*training, "--resume_from_checkpoint", "auto"]  # a requeued job goes on where it was
    # The variables are the node's: they stay outside the quoting.
    if args.rollout_gpus:
        command = _slurm_launch(args, num_processes, training[4:])
    else:
        node = "--machine_rank $SLURM_NODEID --main_process_ip $MAIN_ADDRESS --main_process_port $MAIN_PORT"
        launcher = shlex.join([sys.executable, *_launcher(args, num_processes)])
        command = f"{launcher} {node} --module {shlex.join(training)}"
    template = jinja2.Template(
        (configs_dir() / "slurm.sbatch.j2").read_text(),
        trim_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    text = template.render(
        file=args.slurm,
        method=method,
        nodes=args.nodes,
        per_node=num_processes // args.nodes,
        rollout_gpus=args.rollout_gpus or 0,
        cpus_per_process=args.cpus_per_process,
        cpu=args.cpu,
        workdir=shlex.quote(os.getcwd()),
        command=command.replace("'", "'\\''"),
    )
    if args.dry_run:
        print(text, end="")
        return 0
    Path(args.slurm).write_text(text)
    print(f"wrote {args.slurm}; start it with: sbatch {args.slurm}")
    return 0


def _slurm_launch(args: argparse.Namespace, num_processes: int, extra: list[str]) -> str:
    """`align launch` on each node, which starts the servers of the node and its part of the trainer."""
    words = [sys.executable, "-m", "align", "launch", args.config, "--setup", args.setup]
    words += ["--method", args.method] if args.method else []
    words += ["--num-processes", str(num_processes), "--nodes", str(args.nodes)]
    words += ["--rollout-gpus", str(args.rollout_gpus), "--rollout-port", str(args.rollout_port)]
    words += ["--rollout-tensor-parallel", str(args.rollout_tensor_parallel), *(["--cpu"] if args.cpu else [])]
    words += ["--rollout-start-timeout", str(args.rollout_start_timeout)] if args.rollout_start_timeout else []
    node = "--main-port $MAIN_PORT"
    if args.nodes > 1:
        node += " --node-rank $SLURM_NODEID --main-address $MAIN_ADDRESS --node-addresses $ADDRESSES"
    return f"{shlex.join(words)} {node} {shlex.join(extra)}"
