"""Starting a vLLM server for rollouts, in this process."""

import json
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import requests

from align.errors import RolloutError
from align.rollout.server.guard import KEY_VARIABLE
from align.rollout.server.plugin import TRANSFER

# Routes for weights and workers, which our key guards; no usage statistics.
ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
DEFAULTS = {"VLLM_LOGGING_LEVEL": "ERROR"}


def prepare(key: str) -> None:
    """What vLLM and torch read from the environment when they are loaded. The key goes that way, because arguments can
    be seen by every user of the machine."""
    os.environ.update({**DEFAULTS, **os.environ, **ENVIRONMENT, KEY_VARIABLE: key})
    import torch

    if not torch.cuda.is_available():
        os.environ["TORCH_COMPILE_DISABLE"] = "1"  # two small helpers take 6 to 30 s to compile on CPUs, for nothing


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
    from vllm.entrypoints.launchers.api_server.entry import run_server
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from align.modeling.logprobs import language_model
    from align.rollout.adapters import lora_rank, why_merged
    from align.rollout.vllm_engine import llm_options, write_config
    from align.rollout.weights import check_supported, checkpoint_shapes

    check_supported(model)
    core = language_model(model)
    rank = lora_rank(model) if isinstance(model, PeftModel) and why_merged(model) is None else None
    shapes = checkpoint_shapes(model, merged=rank is None)
    own = llm_options(core, shapes, dtype=dtype, rank=rank, **options)
    with tempfile.TemporaryDirectory(prefix="align_serve_") as folder:
        write_config(core, dtype, folder)
        file = Path(folder) / "shapes.json"
        file.write_text(json.dumps(own["model_loader_extra_config"]["shapes"]))
        own["model_loader_extra_config"] = {"shapes": str(file)}
        own |= {"model": folder, "host": host, "port": port, "tensor_parallel_size": tensor_parallel_size}
        args = make_arg_parser(FlexibleArgumentParser()).parse_args([*FIXED, *as_arguments(own)])
        validate_parsed_serve_args(args)
        watch = threading.Thread(
            target=announce, args=(f"http://{host}:{port}", key, ready, start_seconds), daemon=True
        )
        watch.start()
        run_until_stopped(run_server(args))


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
        else:
            arguments += [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return arguments


def run_until_stopped(server) -> None:
    import uvloop

    try:
        uvloop.run(server)
    except RuntimeError as error:  # of vLLM's engine, whose own process has said why
        raise RolloutError(f"the rollout server could not start: {error}") from error


def announce(url: str, key: str, ready: str, seconds: float) -> None:
    """Print `ready` when the server answers; end this process if it does not in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if requests.get(f"{url}/health", headers={"Authorization": f"Bearer {key}"}, timeout=5).ok:
                print(ready, flush=True)
                return
        except requests.RequestException:
            pass  # not there yet
        time.sleep(0.2)
    print(f"align: error: the rollout server {url} did not answer within {seconds:g} seconds", file=sys.stderr)
    os.kill(os.getpid(), signal.SIGTERM)
