"""The setups of `align launch` on processors, made by accelerate's own code from our files in configs/accelerate."""

import os
from contextlib import contextmanager

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env

from align.config import configs_dir


@contextmanager
def under(setup: str):
    """one: as it is; ddp: as it is on two processes; fsdp2: accelerate takes the processors for accelerators."""
    if setup != "fsdp2":
        yield
        return
    before = {name: os.environ.get(name) for name in environment(setup)}
    make = AcceleratorState.__init__

    def init(self, *args, **kwargs):
        # FSDP is for accelerators there, though PyTorch shards on processors too
        if PartialState(cpu=True).distributed_type == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        make(self, *args, **kwargs)

    os.environ |= environment(setup)
    AcceleratorState.__init__ = init
    try:
        yield
    finally:
        AcceleratorState.__init__ = make
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def environment(setup: str) -> dict[str, str]:
    """What `align launch --setup` gives to the processes, beside their ranks."""
    file = str(configs_dir() / "accelerate" / f"{setup}.yaml")
    arguments = ["--config_file", file, "--num_processes", "2", "--num_machines", "1", "--module", "align"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    return {name: value for name, value in prepare_multi_gpu_env(args).items() if os.environ.get(name) != value}
