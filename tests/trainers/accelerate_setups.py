"""The setups of `align launch` on processors, made by accelerate's own code from our files in configs/accelerate."""

import os
from contextlib import contextmanager

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from align.config import configs_dir

OF_DEEPSPEED = frozenset(
    ["ACCELERATE_CONFIG_DS_FIELDS"]
    + [f"ACCELERATE_DEEPSPEED_{name}" for name in ("ZERO_STAGE", "ZERO3_INIT", "ZERO3_SAVE_16BIT_MODEL")]
    + [f"ACCELERATE_DEEPSPEED_OFFLOAD_{name}_DEVICE" for name in ("OPTIMIZER", "PARAM")]
)
"""What a file of DeepSpeed's own (`deepspeed`) does not go together with."""


@contextmanager
def under(setup: str):
    """one: as it is; ddp: as it is on two processes; fsdp2, zero2, zero3: accelerate takes the processors for
    accelerators."""
    if setup in ("one", "ddp"):
        yield
        return
    before = {name: os.environ.get(name) for name in environment(setup)}
    make = AcceleratorState.__init__

    def init(self, *args, **kwargs):
        # FSDP and DeepSpeed are for accelerators there, though they shard on processors too
        if PartialState(cpu=True).distributed_type == DistributedType.MULTI_CPU:
            kind = DistributedType.MULTI_GPU if setup == "fsdp2" else DistributedType.DEEPSPEED
            PartialState._shared_state["distributed_type"] = kind
            if setup != "fsdp2":
                kwargs["cpu"] = False
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
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    if setup == "fsdp2":
        found = prepare_multi_gpu_env(args)
    else:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)  # as `launch_command`
        _, found = prepare_deepspeed_cmd_env(args)
        found["ACCELERATE_USE_CPU"] = "false"  # which leaves DeepSpeed out
    return {name: value for name, value in found.items() if os.environ.get(name) != value}
