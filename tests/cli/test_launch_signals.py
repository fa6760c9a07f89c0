"""Signals under `align launch`: they reach every process of the run, once, and its exit status comes back."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from align.config import configs_dir

WORKER = """
import os, signal, sys, time
folder, patience = sys.argv[1], float(sys.argv[2])
rank = os.environ["RANK"]
seen = []
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, lambda given, _: seen.append(given))
open(f"{folder}/started-{rank}", "w").write(str(os.getpid()))
while not seen:
    time.sleep(0.01)
time.sleep(patience if rank == "1" else 0)  # its part of the checkpoint takes longer
open(f"{folder}/ended-{rank}", "w").write(" ".join(map(str, map(int, seen))))
sys.exit(75)
"""


@pytest.fixture
def launched(tmp_path):
    running = []

    def start(patience: float) -> subprocess.Popen:
        (tmp_path / "worker.py").write_text(WORKER)
        setup = ["--config_file", str(configs_dir() / "accelerate" / "ddp.yaml"), "--num_processes", "2"]
        words = [*setup, "--num_machines", "1", str(tmp_path / "worker.py"), str(tmp_path), str(patience)]
        running.append(
            subprocess.Popen(
                [sys.executable, "-m", "align.cli.launcher", *words],
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )
        end = time.monotonic() + 240
        while len(list(tmp_path.glob("started-*"))) < 2 and time.monotonic() < end:
            assert running[0].poll() is None, running[0].stderr.read()
            time.sleep(0.05)
        return running[0]

    yield start
    for process in running:
        process.kill()
        process.wait()


def alive(folder: Path) -> list[int]:
    pids = [int(path.read_text()) for path in folder.glob("started-*")]
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_a_signal_reaches_every_process_once_and_their_status_comes_back(launched, tmp_path):
    process = launched(1.0)
    process.send_signal(signal.SIGUSR1)
    process.send_signal(signal.SIGUSR1)  # as SLURM may: the same one
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75
    assert [(tmp_path / f"ended-{rank}").read_text() for rank in (0, 1)] == [str(int(signal.SIGUSR1))] * 2
    assert "Traceback" not in said and "after SIGUSR1, ended with status 75" in said and not alive(tmp_path)


def test_a_second_signal_ends_the_run_at_once(launched, tmp_path):
    process = launched(100.0)
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(4)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGKILL and "Traceback" not in said and not alive(tmp_path)
