"""Starting a vLLM server for rollouts, in this process."""

import json
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import requests

from align.config.server_key import VLLM_KEY_VARIABLE
from align.errors import RolloutError
from align.rollout.server.plugin import TRANSFER
from align.rollout.vllm_versions import known_names

# Routes for weights and workers, which our key guards; no usage statistics.
ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
DEFAULTS = {"VLLM_LOGGING_LEVEL": "ERROR"}
LONGEST_FOLDER = 70  # characters: a socket's path has at most 107, of which vLLM's name takes 37


def address(host: str, port: int) -> str:
    """Where a server that listens there answers."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def check_free(host: str, port: int) -> None:
    """Raises `RolloutError` for an address that cannot be listened on, before the minute in which a server starts."""
    if not 0 < port < 1 << 16:  # which getaddrinfo takes modulo 65,536
        raise RolloutError(f"--port goes from 1 to 65535, not {port}")
    try:
        family, *_, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as vLLM: a server that has just ended is gone
            probe.bind(place)
    except OSError as error:
        raise RolloutError(
            f"the rollout server cannot listen at {address(host, port)} ({error}): name another --port or --host"
        ) from error


def prepare() -> None:
    """What vLLM and torch read from the environment when they are loaded."""
    os.environ.update({**DEFAULTS, **os.environ, **ENVIRONMENT})
    import torch

    if not torch.cuda.is_available():
        os.environ["TORCH_COMPILE_DISABLE"] = "1"  # two small helpers take 6 to 30 s to compile on CPUs, for nothing


@known_names()
def serve(
    model,
    key: str,
    *,
    host: str,
    port: int,
    dtype,
    ready: str,
    start_seconds: float,
    tensor_parallel_size: int = 1,
    **options,
) -> None:
    """Serve the architecture of `model`, with random weights, until a signal ends it.

    model: a transformers or PEFT model, on the meta device too: only shapes are read. ready: a line to print once the
    server answers. options: of `llm_options`. `prepare` comes first. Raises `RolloutError` for one that cannot start.
    """
    from peft import PeftModel
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from align.modeling.logprobs import language_model
    from align.modeling.text_part import text_model
    from align.rollout.adapters import lora_rank, why_merged
    from align.rollout.vllm_engine import llm_options, write_config
    from align.rollout.weights import check_supported, checkpoint_shapes

    os.environ[VLLM_KEY_VARIABLE] = key  # not an argument, which every user of the machine can see
    check_supported(model)
    core = text_model(language_model(model))
    # of slices of an adapter none could be proved: it is merged, and room for one would slow the kernels for nothing
    adapts = tensor_parallel_size == 1 and isinstance(model, PeftModel) and why_merged(model) is None
    rank = lora_rank(model) if adapts else None
    shapes = checkpoint_shapes(model, merged=rank is None)
    own = llm_options(core, shapes, dtype=dtype, rank=rank, **options)
    with tempfile.TemporaryDirectory(prefix="align_serve_") as folder:
        keep_in(folder)
        write_config(core, dtype, folder)
        file = Path(folder) / "shapes.json"
        file.write_text(json.dumps(own["model_loader_extra_config"]["shapes"]))
        own["model_loader_extra_config"] = {"shapes": str(file)}
        own |= {"model": folder, "host": host, "port": port, "tensor_parallel_size": tensor_parallel_size}
        run_server, cli_args = vllm_server()
        args = cli_args.make_arg_parser(FlexibleArgumentParser()).parse_args([*FIXED, *as_arguments(own)])
        cli_args.validate_parsed_serve_args(args)
        watch = threading.Thread(target=announce, args=(address(host, port), key, ready, start_seconds), daemon=True)
        watch.start()
        run_until_stopped(partial(run_server, args), folder)


def keep_in(folder: str) -> None:
    """vLLM leaves sockets and files where temporary ones go."""
    if len(folder) <= LONGEST_FOLDER:
        os.environ["TMPDIR"] = tempfile.tempdir = folder


def vllm_server() -> tuple[Any, Any]:
    """vLLM's function that serves, and the module of its arguments; it has moved both twice."""
    try:
        from vllm.entrypoints.launchers.api_server.entry import run_server
    except ImportError:  # below 0.31
        from vllm.entrypoints.openai import cli_args
        from vllm.entrypoints.openai.api_server import run_server

        return run_server, cli_args
    try:
        from vllm.entrypoints.common import cli_args
    except ImportError:  # below 0.33
        from vllm.entrypoints.launchers import cli_args
    return run_server, cli_args


FIXED = [
    "--tokens-only",  # token ids in, token ids out: no tokenizer
    "--disable-uvicorn-access-log",
    *("--uvicorn-log-level", "warning"),
    *("--middleware", "align.rollout.server.guard.KeyGuard"),
    *("--worker-extension-cls", "align.rollout.server.worker.WorkerExtension"),
    *("--weight-transfer-config", json.dumps({"backend": TRANSFER})),
]


def as_arguments(options: dict) -> list[str]:
    """Options of `vllm.LLM` as arguments of `vllm serve`."""
    arguments = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list):
            arguments += [f"--{flag}", *map(str, value)]
        else:
            arguments += [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return arguments


def run_until_stopped(run_server: Callable, folder: str) -> None:
    import uvloop

    from align.rollout.server.ending import CALLS, Ending

    ending = Ending(folder)
    try:
        uvloop.run(run_server(timeout_graceful_shutdown=CALLS), loop_factory=ending.loop)
    except (RuntimeError, OSError) as error:  # of vLLM's engine, whose own process has said why; of the port
        raise RolloutError(f"the rollout server could not start: {error}") from error
    finally:
        ending.finish()


def announce(url: str, key: str, ready: str, seconds: float) -> None:
    """Print `ready` when the server answers; end this process if it does not in time."""
    end = time.monotonic() + seconds
    http = requests.Session()
    http.trust_env = False  # neither a proxy, which would get the key, nor ~/.netrc, which would take its place
    while time.monotonic() < end:
        try:
            if http.get(f"{url}/health", headers={"Authorization": f"Bearer {key}"}, timeout=5).ok:
                print(ready, flush=True)
                return
        except requests.RequestException:
            pass  # not there yet
        time.sleep(0.2)
    print(f"align: error: the rollout server {url} did not answer within {seconds:g} seconds", file=sys.stderr)
    os.kill(os.getpid(), signal.SIGTERM)
