"""Processes that have everything imported when they start: importing takes a process twelve seconds, a fork none.

A process of its own makes them, since the one of the tests has torch's threads, which do not outlive a fork. It is
started by the first test that needs it, and serves until the tests end: `python -m tests.warm` reads a request per
line (module, arguments, how many processes, environment, folder of their output) and answers when it is done.
"""

import atexit
import faulthandler
import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

from benchmarks.faults.processes import import_everything
from tests.garbage import freeze

ROOT = Path(__file__).parents[1]
SECONDS = 600
"""After which the processes of a request are ended."""
_server: subprocess.Popen | None = None


def run_ranks(module: str, *arguments: str, logs: Path, count: int = 2, killed: int | None = None) -> list[str]:
    """What the ranks of `python -m module arguments` print, which torchrun would start. Fails if one of them does.

    module: or the path of a script. logs: a folder for what they print. count: one has no rank. killed: the rank that
    kills itself, after which the others are left to end by themselves.
    """
    logs.mkdir(parents=True, exist_ok=True)
    request = {"module": module, "arguments": arguments, "count": count, "logs": str(logs), "killed": killed}
    server = _started()
    assert server.stdin and server.stdout
    server.stdin.write(json.dumps(request | {"environment": dict(os.environ)}) + "\n")
    server.stdin.flush()
    answer = server.stdout.readline()
    printed = [(logs / f"rank{rank}.txt").read_text(errors="replace") for rank in range(count)]
    printed = [re.sub(r"\nExtension modules: .*", "", text) for text in printed]  # after the stacks of a crash: pages
    ended = json.loads(answer) if answer else "the process that starts them has ended"
    expected = [-signal.SIGKILL if rank == killed else 0 for rank in range(count)]
    assert ended == expected, f"{module} ended with {ended}\n" + "\n".join(text[-6000:] for text in printed)
    return printed


def _started() -> subprocess.Popen:
    global _server
    if _server is None:
        _server = subprocess.Popen(
            [sys.executable, "-m", "tests.warm"], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        atexit.register(_end, _server)
    return _server


def _end(server: subprocess.Popen) -> None:
    assert server.stdin
    server.stdin.close()
    try:
        server.wait(timeout=10)
    except subprocess.TimeoutExpired:  # it waits for processes of a test that was interrupted
        server.kill()


def serve() -> None:
    import_everything()
    import torch.distributed.checkpoint.state_dict
    import torch.distributed.fsdp
    import torch.distributed.tensor  # noqa: F401

    freeze()  # neither looked through by each process nor copied for it
    for line in sys.stdin:
        print(json.dumps(_run(json.loads(line))), flush=True)


def _run(request: dict) -> list[int]:
    """Exit codes by rank. When one fails, the others are ended, as a launcher does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = [_fork(request, rank, port) for rank in range(request["count"])]
    killed = None if request["killed"] is None else children[request["killed"]]
    codes: dict[int, int] = {}
    end = time.monotonic() + SECONDS
    while len(codes) < len(children):
        for child in set(children) - codes.keys():
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[child] = os.waitstatus_to_exitcode(status)
        failed = [code for child, code in codes.items() if code and (child, code) != (killed, -signal.SIGKILL)]
        if failed or time.monotonic() > end:
            for child in set(children) - codes.keys():
                os.kill(child, signal.SIGKILL)
                codes[child] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        time.sleep(0.02)
    return [codes[child] for child in children]


def _fork(request: dict, rank: int, port: int) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        out = os.open(Path(request["logs"]) / f"rank{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        os.dup2(out, 1), os.dup2(out, 2), os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        faulthandler.enable(file=out)  # where one that crashes is, all threads
        faulthandler.dump_traceback_later(SECONDS - 10, file=out)  # where one that hangs is, before it is ended
        module, size = request["module"], str(request["count"])
        os.environ.clear()
        os.environ |= request["environment"] | {"OMP_NUM_THREADS": "1"}
        if request["count"] > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        sys.argv = [module, *request["arguments"]]
        if module.endswith(".py"):
            runpy.run_path(module, run_name="__main__")
        else:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except BaseException as error:
        traceback.print_exc()
        code = 0 if isinstance(error, SystemExit) and not error.code else 1
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
