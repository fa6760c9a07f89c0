"""`align launch --rollout-gpus`: rollout servers and trainer on one set of GPUs, started and ended together."""

import ctypes
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from align.cli.serve import START_SECONDS
from align.config.secrets import masked_tokens
from align.errors import ConfigError, RolloutError

if TYPE_CHECKING:
    from align.rollout.server.options import ServerOptions

GRACE = 60  # seconds that servers have to end
BEAT = 1.0  # seconds between two looks at the servers
STARTS = 5  # in vain, after which a server is not started again
PAUSE = 2.0  # seconds before the second start, doubled for each further one
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
PR_SET_PDEATHSIG = 1
if sys.platform == "linux":
    PRCTL = ctypes.CDLL(None).prctl  # looked up here: a process that has just been forked may take no locks


@dataclass(frozen=True)
class Started:
    """A process: words of its command, and what its environment has beside ours."""

    words: list[str]
    environment: dict[str, str]

    def shown(self) -> str:
        """As a shell would start it, without secrets."""
        variables = "".join(f"{name}={shlex.quote(value)} " for name, value in self.environment.items())
        return variables + shlex.join(masked_tokens(self.words))


def check(args, method) -> None:
    """Raises `ConfigError` for options that do not go together."""
    servers, width = args.rollout_gpus, args.rollout_tensor_parallel
    if method.data != "prompts":
        raise ConfigError(f"`align {method.name}` makes no completions: leave --rollout-gpus out")
    if servers < 1 or width < 1 or servers % width:
        raise ConfigError(
            f"--rollout-gpus {servers} is not a number of servers of --rollout-tensor-parallel {width} GPUs each"
        )
    if args.nodes > 1 and not args.slurm and len(addresses(args)) != args.nodes:
        raise ConfigError(f"--rollout-gpus on {args.nodes} nodes needs their --node-addresses, as node0,node1")


def addresses(args) -> list[str]:
    """Of the machines with servers. Raises `ConfigError` for what is no name or address, and for one given twice."""
    if args.node_addresses is None:
        return ["127.0.0.1"]
    names = [name.strip() for name in args.node_addresses.split(",")]
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9_.:-]+", name):
            raise ConfigError(f"--node-addresses: {name!r} is no name of a machine; write them as node0,node1")
    if len(set(names)) < len(names):
        raise ConfigError(f"--node-addresses {args.node_addresses} names a machine twice")
    return names


def placed(args, extra: list[str]) -> "tuple[list[str], ServerOptions]":
    """The options of the run that name its servers, and its section `rollout` with them. Raises `ConfigError` where
    that forbids them."""
    from align.config.source import apply_overrides, read_file, read_overrides
    from align.rollout.make import rollout_options
    from align.rollout.server.launch import address
    from align.rollout.server.options import ServerOptions

    count = args.rollout_gpus // args.rollout_tensor_parallel
    urls = [address(host, args.rollout_port + i) for host in addresses(args) for i in range(count)]
    words = ["--rollout.backend", "server", "--rollout.urls", *urls]
    entries = read_file(args.config)
    apply_overrides(entries, read_overrides([*extra, *words]))
    return words, cast(ServerOptions, rollout_options(entries["rollout"].value))


def servers(args, extra: list[str], devices: list[str]) -> list[Started]:
    """The servers of this machine. devices: its GPUs for them; none on processors."""
    width, host = args.rollout_tensor_parallel, "127.0.0.1" if args.nodes == 1 else "0.0.0.0"  # noqa: S104
    method = ["--method", args.method] if args.method else []
    started = []
    for number in range(args.rollout_gpus // width):
        own = ["--host", host, "--port", str(args.rollout_port + number), "--tensor-parallel", str(width)]
        own += ["--start-timeout", str(args.rollout_start_timeout)] if args.rollout_start_timeout else []
        gpus = {} if args.cpu else {"CUDA_VISIBLE_DEVICES": ",".join(devices[number * width : (number + 1) * width])}
        started.append(Started([sys.executable, "-m", "align", "serve", args.config, *method, *own, *extra], gpus))
    return started


def devices(args, trainers: int) -> list[str]:
    """The GPUs of this machine that the run may use, those of the trainer first. Raises `ConfigError` for too few."""
    need = trainers + args.rollout_gpus
    if args.cpu:
        return []
    if named := os.environ.get("CUDA_VISIBLE_DEVICES"):
        found = named.split(",")
    elif args.dry_run:
        return [str(number) for number in range(need)]
    else:
        import torch

        found = [str(number) for number in range(torch.cuda.device_count())]
    if len(found) < need:
        raise ConfigError(
            f"{trainers} processes that train and --rollout-gpus {args.rollout_gpus} need {need} GPUs of this machine, "
            f"which shows {len(found)}"
        )
    return found[:need]


def supervise(before: list[Started], trainer: Started, *, again: bool, start: float = START_SECONDS) -> int:
    """Start the servers, then the trainer; its exit status. Signals go to the trainer, and servers end after it.

    again: a server that ends while the trainer runs is started again. start: seconds in which a server serves or ends
    by itself. Raises `RolloutError` for one that does not start.
    """
    places: list[Place] = []
    try:
        for one in before:
            places.append(Place(Server(one)))
        end = time.monotonic() + start + GRACE
        for place in places:
            place.server.wait_ready(end)
        ended = _train(trainer, places, again)
    finally:
        _end([place.server for place in places])
    return ended if ended >= 0 else 128 - ended


def _train(trainer: Started, places: "list[Place]", again: bool) -> int:
    """Run the trainer to its end; its exit code. The signals are its own meanwhile, and ours again afterwards."""
    process = subprocess.Popen(
        trainer.words, env={**os.environ, **trainer.environment}, start_new_session=True, preexec_fn=with_parent
    )
    handlers = {number: signal.signal(number, lambda given, _: process.send_signal(given)) for number in SIGNALS}
    try:
        while process.poll() is None:
            if again:
                for place in places:
                    place.look()
            with suppress(subprocess.TimeoutExpired):
                process.wait(BEAT)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return process.returncode


def _end(running: "list[Server]") -> None:
    """Ask all servers to end, and kill what is left of them after `GRACE` seconds, or at an interrupt."""
    end = time.monotonic() + GRACE
    try:
        for server in running:
            server.process.terminate()
        with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            for server in running:
                server.process.wait(max(end - time.monotonic(), 0))
    finally:
        for server in running:
            server.kill()


class Server:
    """A server that has been started. What it prints is passed on. served: it has said that it answers."""

    def __init__(self, started: Started):
        self.started, self.served, self.ready = started, False, threading.Event()
        # a session of its own: an interrupt from the keyboard is for the trainer, which may need its servers once more
        self.process = subprocess.Popen(
            started.words,
            env={**os.environ, **started.environment},
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=with_parent,
        )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            print(line, end="", flush=True)
            if line.startswith("serving at "):
                self.served = True
                self.ready.set()
        self.ready.set()

    def wait_ready(self, end: float) -> None:
        """end: of the monotonic clock. A server ends itself after its --start-timeout, but not one that is stopped, or
        whose first imports hang."""
        while not self.ready.wait(BEAT):
            if time.monotonic() > end:
                raise RolloutError(
                    f"a rollout server neither serves nor ends, {GRACE} seconds after its time to start "
                    f"(--rollout-start-timeout) is over, and is killed: {self.started.shown()}"
                )
            if self.process.poll() is not None:  # what it has started may hold the pipe open
                self.ready.wait(BEAT)
                break
        if not self.served:
            raise RolloutError(f"a rollout server did not start: {self.started.shown()}")

    def kill(self) -> None:
        """With its whole session: vLLM's processes hold the GPUs, also when the one that started them is gone."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@dataclass
class Place:
    """Where a server runs: it is started again there when it ends, at most `STARTS` times in a row in vain."""

    server: Server
    failures: int = 0  # starts in a row that served nothing
    due: float | None = None  # when the next start is due, in seconds of the monotonic clock

    def look(self) -> None:
        """Start the server again if it has ended and its pause is over."""
        server = self.server
        if server.process.poll() is None or self.failures >= STARTS:
            return
        if self.due is None:
            server.kill()
            server.reader.join(GRACE)  # its last line may be that it serves
            self.failures = 0 if server.served else self.failures + 1
            pause = 0 if server.served else min(PAUSE * 2**self.failures, GRACE)
            self.due = time.monotonic() + pause
            how = f"align launch: a rollout server has ended with status {server.process.returncode}"
            if self.failures >= STARTS:
                print(f"{how}, {STARTS} times before it served, and is not started again: {server.started.shown()}")
                print("the run waits for it up to rollout.wait_limit", flush=True)
                return
            print(f"{how}, and is started again in {pause:g} s", flush=True)
        if time.monotonic() >= self.due:
            self.server, self.due = Server(server.started), None


def with_parent() -> None:
    """In a new process: end with the process that has started it, also where that one is killed."""
    if sys.platform == "linux":
        PRCTL(PR_SET_PDEATHSIG, signal.SIGTERM)
