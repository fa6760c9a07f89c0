"""What servers and the engine before them keep to: collected by `test_server`, whose servers these tests share."""

import os
import re
import resource
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import requests
import torch
from transformers import LlamaConfig

from align.errors import RolloutError
from align.rollout import SamplingParams
from align.rollout.server.client import Server, ServerLost
from align.rollout.server.fitting import check_fit
from align.rollout.weights import checkpoint_shapes
from tests.rollout.rollout_models import is_greedy, prompts
from tests.rollout.served import KEY, connected


def test_more_prompts_than_files_may_be_open(both, model):
    """Connections are taken and given back: 1,024 open files, a usual limit, are fewer than the prompts of a step."""
    both.push(model, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = 2 * (len(os.listdir("/proc/self/fd")) + 8)
    ids = prompts([3] * (few + 50))
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, hard))
    try:
        rollouts = both.generate(ids, SamplingParams(1, temperature=0))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert all(is_greedy(model, r.prompt_ids, r.completions[0].token_ids) for r in rollouts[::40])


@pytest.mark.parametrize("waits", [False, True])
def test_completions_that_take_too_long_are_counted(both, model, monkeypatch, waits):
    """Also with `wait`, where the servers live: nothing is waited for without an end."""
    both.push(model, 1)
    monkeypatch.setattr(both, "waits", waits)
    monkeypatch.setattr(both, "generation_limit", 0.03)
    start = time.monotonic()
    with pytest.raises(RolloutError, match=r"5 of 5 requests were not answered within generation_limit \(0.03 sec"):
        both.generate(prompts([4, 5, 6, 7, 8]), SamplingParams(240, n=9))
    assert time.monotonic() - start < 3


def test_what_servers_must_have_in_common(both, model, monkeypatch):
    """The dtype of the arithmetic, in which a few tensors may be wider; the kind of device, and so of the proof."""

    def fit(config=model.config, longest=256):
        known = both.servers, checkpoint_shapes(model).keys(), both.dtype, longest, config
        check_fit(*known)

    both.push(model, 1)
    parts = {**both.servers[0].parts}
    name = "model.norm.weight"
    parts[name] = [[*part[:-1], "float64"] for part in parts[name]]
    for server in both.servers:
        monkeypatch.setattr(server, "parts", parts)
    fit()
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 200}
    scaled = LlamaConfig(rope_parameters={**rope, "short_factor": [1.0] * 64, "long_factor": [2.0] * 64})
    fit(scaled, 201)
    with pytest.raises(RolloutError, match=r"takes \d+ tokens and LongRoPE's factors for long .* 200 and those for sh"):
        fit(scaled, 200)
    (piece,) = both._parts(name, torch.ones(64))
    assert piece.dtype == torch.float64 and piece.sum() == 64
    with monkeypatch.context() as patch:
        patch.setattr(both.servers[1], "dtype", "bfloat16")
        with pytest.raises(RolloutError, match=f"{served_url(both, 1)} computes in bfloat16, and this run in"):
            fit()
    monkeypatch.setattr(both.servers[1], "device", "cuda")
    with pytest.raises(RolloutError, match=f"{served_url(both, 1)} runs on cuda, and .* on cpu: .* of one kind"):
        fit()


def served_url(engine, number: int) -> str:
    return re.escape(engine.servers[number].url)


def test_the_proof_is_made_as_the_servers_make_theirs(served, both, model, monkeypatch):
    """A trainer on a GPU before servers on CPUs hashes bytes, and one on a CPU before GPUs sums bits."""
    assert both._sums is False
    monkeypatch.setattr(both, "_sums", True)
    with pytest.raises(RolloutError, match="do(es)? not hold the trainer's weights"):
        both.push(model, 1)


def test_a_server_that_is_lost_during_the_proof_is_waited_for(both, model, monkeypatch):
    lost, ask = [], Server.fingerprints

    async def once(self, *rest):
        if self is both.servers[1] and not lost:
            lost.append(self)
            raise ServerLost(f"{self.url} is away")
        return await ask(self, *rest)

    monkeypatch.setattr(Server, "fingerprints", once)
    with pytest.raises(ServerLost, match="is away"):
        both.push(model, 1)
    lost.clear()
    monkeypatch.setattr(both, "waits", True)
    assert both.push(model, 2).proved_tensors == len(dict(model.named_parameters())) and lost


def test_a_server_that_is_lost_while_a_run_connects_is_waited_for(served, model, monkeypatch):
    lost, call = [], Server.call

    async def once(self, http, method, path, *rest, **named):
        if path == "/v1/models" and not lost:
            lost.append(self)
            raise ServerLost(f"{self.url} is away")
        return await call(self, http, method, path, *rest, **named)

    monkeypatch.setattr(Server, "call", once)
    with pytest.raises(ServerLost, match="is away"), connected(served, model):
        pass
    lost.clear()
    with connected(served, model, on_engine_failure="wait", timeout=2) as engine:
        assert lost and [server.longest for server in engine.servers] == [256, 256]


def test_a_server_that_was_started_anew_is_known_by_its_empty_label(both, model):
    both.push(model, 1)
    server = both.servers[1]
    both._background.run(both._with_session(lambda http: server.name_weights(http, "")))
    with pytest.raises(
        ServerLost, match=f"{served_url(both, 1)} has not got the weights of this run: it was started anew"
    ):
        both.generate(prompts([4, 5]), SamplingParams(2))
    both._background.run(both._with_session(lambda http: server.name_weights(http, "0123abcd:4")))
    with pytest.raises(RolloutError, match="has the weights of another run .0123abcd."):
        both.generate(prompts([4, 5]), SamplingParams(2))
    both.push(model, 1)


def test_a_server_that_is_not_there_yet_is_waited_for_but_not_for_ever(served, model):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    for options, message in (
        ({}, "start it with `align serve`"),
        ({"on_engine_failure": "wait"}, "did not come back in 0.6 sec"),
    ):
        start = time.monotonic()
        with (
            pytest.raises(RolloutError, match=f"{url} cannot be reached.*{message}|{url} {message}"),
            connected(served, model, urls=[url], wait_limit=0.6, timeout=1, **options),
        ):
            pass
        assert (time.monotonic() - start > 0.6) is bool(options)


def ended(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def shared_memory(processes: list[psutil.Process]) -> set[Path]:
    maps = "".join(Path(f"/proc/{process.pid}/maps").read_text() for process in processes)
    return {file for file in Path("/dev/shm").iterdir() if f"{file}\n" in maps}


@pytest.mark.skipif(
    not Path("/proc/self/maps").exists(),
    reason="needs /proc/PID/maps of Linux, which CI has: says who has which shared memory open",
)
def test_a_server_whose_engine_hangs_ends_with_all_it_has_started(served):
    """At SIGTERM, while a call is open that nobody will answer: vLLM alone waits for it without limit."""
    server, *started = served.members(0)
    memory, answers = shared_memory([server, *started]), []
    assert memory and os.listdir(served.temporary[0])
    frozen = [one for one in started if "VLLM::" in " ".join(one.cmdline())]
    assert len(frozen) == 2  # the engine and its worker, which does not see that its engine is gone

    def call() -> None:
        asked = {"token_ids": [5, 6, 7], "sampling_params": {"max_tokens": 5}}
        own = {"Authorization": f"Bearer {KEY}"}
        try:
            answers.append(
                requests.post(f"{served.urls[0]}/inference/v1/generate", json=asked, headers=own, timeout=60)
            )
        except requests.ConnectionError:
            answers.append(None)

    for one in frozen:
        one.suspend()
    caller = threading.Thread(target=call)
    caller.start()
    time.sleep(1)
    assert not answers
    start = time.monotonic()
    served.processes[0].terminate()
    assert served.processes[0].wait(30) == 0
    assert time.monotonic() - start < 12
    caller.join(5)
    assert answers == [None] or not answers[0].ok
    while not all(map(ended, started)) and time.monotonic() < start + 15:  # what frees shared memory ends last
        time.sleep(0.05)
    assert all(map(ended, started)) and not [file for file in memory if file.exists()]
    assert not os.listdir(served.temporary[0])


ENDLESS = """
import asyncio, os, signal, subprocess, sys
from align.rollout.server import ending

ending.DEADLINE = 0.5

async def endless():
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, lambda: None)
    print(subprocess.Popen(["sleep", "60"]).pid, flush=True)
    await asyncio.sleep(60)

own = ending.Ending(sys.argv[1])
asyncio.Runner(loop_factory=own.loop).run(endless())
"""


def test_a_server_that_does_not_end_is_killed(tmp_path):
    (tmp_path / "folder").mkdir()
    command = [sys.executable, "-c", ENDLESS, str(tmp_path / "folder")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    child = psutil.Process(int(process.stdout.readline()))
    process.terminate()
    _, said = process.communicate(timeout=10)
    assert process.returncode == 1 and "the rollout server did not end within 0.5 seconds of a signal" in said
    assert ended(child) and not (tmp_path / "folder").exists()
