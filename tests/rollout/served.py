"""Real servers, started by `align serve`, and engines that draw from them."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from contextlib import contextmanager

import psutil
import pytest

from align.rollout.server.engine import ServerEngine
from tests.rollout.rollout_models import llama

KEY = "a key for tests"
CONFIG = """
method: rloo
model_name_or_path: {folder}/model
dataset_name: {folder}/prompts.jsonl
rewards: [{{type: rule, function: "builtins:len"}}]
max_prompt_length: 200
max_completion_length: 56
use_peft: true
lora_r: 8
lora_target_modules: all-linear
"""


class Served:
    """Servers on ports of this machine, each of which can be started again."""

    def __init__(self, folder, count: int):
        llama().save_pretrained(folder / "model")
        (folder / "run.yaml").write_text(CONFIG.format(folder=folder))
        self.config, self.processes, self.ports = str(folder / "run.yaml"), [None] * count, []
        for _ in range(count):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                self.ports.append(free.getsockname()[1])
        self.temporary = [tempfile.mkdtemp() for _ in self.ports]  # short paths, as sockets need
        self.urls = [f"http://127.0.0.1:{port}" for port in self.ports]

    def start(self, number: int) -> None:
        command = [sys.executable, "-m", "align", "serve", self.config, "--port", str(self.ports[number])]
        environment = {**os.environ, "ALIGN_ROLLOUT_KEY": KEY, "TMPDIR": self.temporary[number]}
        self.processes[number] = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    def ready(self, number: int) -> str:
        line = self.processes[number].stdout.readline()
        assert f"serving at {self.urls[number]}" in line and KEY not in line
        # a server that fails often, as here, writes more than a pipe holds, and would wait for who reads it
        threading.Thread(target=self.processes[number].stdout.read, daemon=True).start()
        return line

    def members(self, number: int) -> list[psutil.Process]:
        process = psutil.Process(self.processes[number].pid)
        return [process, *process.children(recursive=True)]

    def stop(self) -> None:
        for process in self.processes:
            if process is not None and process.poll() is None:
                process.terminate()
        for process in self.processes:
            process.wait(60)
        for folder in self.temporary:
            shutil.rmtree(folder)


@contextmanager
def connected(served, model, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGN_ROLLOUT_KEY", KEY)
        engine = ServerEngine(model, max_model_len=256, **{"urls": served.urls, **options})
    try:
        engine.verify(model)
        yield engine
    finally:
        engine.close()
