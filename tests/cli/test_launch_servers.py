"""`align launch --rollout-gpus`: who gets which GPUs, and that servers and trainer start and end together."""

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from align.cli import with_servers
from align.cli.main import main
from align.cli.with_servers import Started, supervise
from align.errors import RolloutError


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    path = tmp_path / "run.yaml"
    path.write_text("method: rloo\nrollout: {backend: vllm, kv_cache_gib: 2}\n")
    return str(path)


def launch(*arguments):
    return main(["launch", *map(str, arguments)])


def parts(line: str) -> tuple[str, list[str]]:
    """GPUs of a command and its words behind the interpreter's."""
    gpus, *words = shlex.split(line)
    return gpus.removeprefix("CUDA_VISIBLE_DEVICES="), words[1:]


def test_eight_gpus_are_shared_out(config, capsys):
    options = ["--setup", "fsdp2", "--num-processes", 4, "--rollout-gpus", 4, "--rollout-tensor-parallel", 2]
    assert launch(config, *options, "--learning_rate", "1e-6", "--dry-run") == 0
    said = capsys.readouterr()
    first, second, trainer = map(parts, said.out.splitlines())
    named = "--learning_rate 1e-6 --rollout.backend server --rollout.urls http://127.0.0.1:8000 http://127.0.0.1:8001"
    serve = f"-m align serve {config} --host 127.0.0.1 --port {{}} --tensor-parallel 2 {named}"
    assert first == ("4,5", serve.format(8000).split()) and second == ("6,7", serve.format(8001).split())
    gpus, words = trainer
    assert gpus == "0,1,2,3" and words[:2] == ["-m", "align.cli.launcher"]
    assert " ".join(words).endswith(
        f"--num_processes 4 --num_machines 1 --main_process_port 29500 --module align rloo --config {config} {named}"
    )
    assert said.err.endswith(f": align rloo --config {config} {named} --processes 4 --dry-run\n")


def test_the_gpus_are_those_that_the_environment_shows(config, capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,7")
    assert launch(config, "--num-processes", 2, "--rollout-gpus", 1, "--dry-run") == 0
    server, trainer = map(parts, capsys.readouterr().out.splitlines())
    assert server[0] == "7" and trainer[0] == "3,5"
    assert launch(config, "--num-processes", 3, "--rollout-gpus", 1, "--dry-run") == 2
    assert "need 4 GPUs of this machine, which shows 3" in capsys.readouterr().err


def test_on_two_machines_every_process_knows_all_servers(config, capsys):
    options = ["--num-processes", 8, "--rollout-gpus", 4, "--rollout-tensor-parallel", 4, "--nodes", 2]
    where = ["--node-rank", 1, "--main-address", "n0", "--node-addresses", "n0, n1", "--dry-run"]
    assert launch(config, *options, *where) == 2  # weights go through a folder of both
    assert "http://n0:8000 is on another machine: name a transfer_folder" in capsys.readouterr().err
    assert launch(config, *options, *where, "--rollout.transfer_folder", "/data") == 0
    server, trainer = map(parts, capsys.readouterr().out.splitlines())
    assert server[0] == "4,5,6,7" and "--host 0.0.0.0 --port 8000 --tensor-parallel 4" in " ".join(server[1])
    for _, words in (server, trainer):
        assert words[-3:] == ["--rollout.urls", "http://n0:8000", "http://n1:8000"]


def test_servers_of_a_slow_file_system_have_longer_to_start(config, capsys):
    options = ["--rollout-gpus", 1, "--num-processes", 1, "--rollout-start-timeout", 900, "--dry-run"]
    assert launch(config, *options) == 0
    server, trainer = map(parts, capsys.readouterr().out.splitlines())
    assert "--tensor-parallel 1 --start-timeout 900.0 " in " ".join(server[1])
    assert "timeout" not in " ".join(trainer[1])
    assert launch(config, *options, "--slurm", "-") == 0
    assert " --rollout-start-timeout 900.0 " in capsys.readouterr().out


def test_a_slurm_file_launches_servers_and_trainer_on_every_node(config, capsys):
    options = ["--setup", "fsdp2", "--num-processes", 8, "--rollout-gpus", 4, "--rollout-tensor-parallel", 4]
    options += ["--nodes", 2, "--rollout.transfer_folder", "/my data"]
    assert launch(config, *options, "--slurm", "-", "--dry-run") == 0
    text = capsys.readouterr().out
    assert "#SBATCH --gpus-per-node=8\n" in text and "#SBATCH --cpus-per-task=64\n" in text
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    (line,) = [line for line in text.splitlines() if line.startswith("srun ")]
    # what a node runs, with its variables, is a command that this one takes
    (addresses,) = [line for line in text.splitlines() if line.startswith("ADDRESSES=")]
    script = f"scontrol() {{ printf 'n0\\nn1\\n'; }}; SLURM_JOB_NODELIST=x; {addresses}; export ADDRESSES\n"
    script += 'srun() { shift 2; "$@"; }; export SLURM_CPUS_PER_TASK=64 MAIN_PORT=4 MAIN_ADDRESS=n0 SLURM_NODEID=1\n'
    command = line.removesuffix(" &").replace(sys.executable, 'printf "%s\\n"', 1)
    words = subprocess.run(["bash", "-c", script + command], capture_output=True, text=True).stdout.splitlines()
    assert words[:3] == ["-m", "align", "launch"] and "/my data" in words
    assert launch(*words[3:], "--dry-run") == 0
    server, trainer = map(parts, capsys.readouterr().out.splitlines())
    assert server[0] == "4,5,6,7" and trainer[0] == "0,1,2,3"
    for word in ("--machine_rank 1", "--main_process_ip n0", "--main_process_port 4", "--resume_from_checkpoint auto"):
        assert word in " ".join(trainer[1])


TWO = ["--rollout-gpus", 1, "--nodes", 2, "--node-rank", 0, "--main-address", "a"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rollout-gpus", 1, "--rollout-start-timeout", 0], "--rollout-start-timeout is a number of seconds above 0"),
        (["--rollout-gpus", 3, "--rollout-tensor-parallel", 2], "--rollout-gpus 3 is not a number of servers"),
        (["--rollout-gpus", 0], "--rollout-gpus 0 is not a number"),
        (["--rollout-gpus", 1, "--rollout.timeout", 0], "rollout.timeout: input should be greater than 0"),
        (["--rollout-gpus", 1, "--nodes", 2, "--node-rank", 0, "--main-address", "a"], "needs their --node-addresses"),
        (["--rollout-gpus", 1, "--node-addresses", "n0,n1"], "--node-addresses is for several --nodes"),
        ([*TWO, "--node-addresses", "n0,n 1"], "'n 1' is no name of a machine"),
        ([*TWO, "--node-addresses", "n0,n0"], "names a machine twice"),
        (["--rollout-gpus", 2, "--rollout-port", 65535], "--rollout-port 65535: ports go from 1 to 65535"),
    ],
)
def test_what_cannot_be_shared_out(config, capsys, options, message):
    assert launch(config, "--num-processes", 2, *options, "--dry-run") == 2
    error = capsys.readouterr().err
    assert error.startswith("align: error: ") and message in error and error.count("\n") == 1


def test_a_method_without_completions_has_no_servers(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("method: dpo\n")
    assert launch(tmp_path / "run.yaml", "--num-processes", 2, "--rollout-gpus", 1, "--dry-run") == 2
    assert "`align dpo` makes no completions" in capsys.readouterr().err


SERVER = """
import os, signal, sys, time
def end(*_):
    open(sys.argv[1] + "/ended", "w").close()
    sys.exit()
signal.signal(signal.SIGTERM, end)
print("serving at a place", os.environ["OWN"], flush=True)
time.sleep(60)
"""
TRAINER = """
import signal, sys, time
def told(number, _):
    sys.exit(40 + number)
signal.signal(signal.SIGUSR1, told)
open(sys.argv[1] + "/training", "w").close()
time.sleep(float(sys.argv[2]))
sys.exit(7)
"""


def started(tmp_path, code: str, *more: str) -> Started:
    return Started([sys.executable, "-c", code, str(tmp_path), *more], {"OWN": "its_own"})


@pytest.fixture
def signals():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def test_the_trainer_starts_behind_its_servers_and_they_end_after_it(tmp_path, signals, capfd):
    assert supervise([started(tmp_path, SERVER)], started(tmp_path, TRAINER, "0"), again=False) == 7
    assert (tmp_path / "ended").exists() and "serving at a place its_own" in capfd.readouterr().out


def test_a_signal_reaches_the_trainer_and_then_the_servers_end(tmp_path, signals):
    def tell():
        while not (tmp_path / "training").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGUSR1)

    threading.Thread(target=tell, daemon=True).start()
    assert supervise([started(tmp_path, SERVER)], started(tmp_path, TRAINER, "50"), again=False) == 40 + signal.SIGUSR1
    assert (tmp_path / "ended").exists()


def test_a_server_that_does_not_start_ends_the_others_and_nothing_trains(tmp_path, signals):
    broken = started(tmp_path, "import sys; sys.exit('no memory')")
    with pytest.raises(RolloutError, match="a rollout server did not start: OWN=its_own .* 'import sys;"):
        supervise([started(tmp_path, SERVER), broken], started(tmp_path, TRAINER, "0"), again=False)
    assert (tmp_path / "ended").exists() and not (tmp_path / "training").exists()


ONCE = """
import os, sys, time
print("serving at a place", flush=True)
again = os.path.exists(sys.argv[1] + "/first")
open(sys.argv[1] + ("/second" if again else "/first"), "w").close()
time.sleep(60 if again else 0)
"""
PATIENT = """
import os, sys, time
end = time.monotonic() + float(sys.argv[2])
while not os.path.exists(sys.argv[1] + "/second") and time.monotonic() < end:
    time.sleep(0.02)
"""


@pytest.mark.parametrize("again", [True, False])
def test_a_server_that_dies_is_started_again_for_a_run_that_waits(tmp_path, signals, monkeypatch, again):
    monkeypatch.setattr(with_servers, "BEAT", 0.05)
    trainer = started(tmp_path, PATIENT, "30" if again else "0.5")
    assert supervise([started(tmp_path, ONCE)], trainer, again=again) == 0
    assert (tmp_path / "first").exists() and (tmp_path / "second").exists() is again


SPAWNER = """
import os, subprocess, sys, time
folder = sys.argv[1]
open(f"{folder}/starts", "a").write("x")
first = len(open(f"{folder}/starts").read()) == 1
if first:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(90)"])
    open(f"{folder}/child", "w").write(str(child.pid))
    print("serving at a place", flush=True)
sys.exit(0 if first else 3)
"""


def test_a_server_that_cannot_start_again_is_left_and_its_own_processes_end(tmp_path, signals, monkeypatch, capfd):
    """Restarts have pauses and an end; what a dead server had started does not stay on the GPUs."""
    monkeypatch.setattr(with_servers, "BEAT", 0.05)
    monkeypatch.setattr(with_servers, "PAUSE", 0.01)
    monkeypatch.setattr(with_servers, "STARTS", 3)
    interrupt = signal.getsignal(signal.SIGINT)
    assert supervise([started(tmp_path, SPAWNER)], started(tmp_path, PATIENT, "6"), again=True) == 0
    assert (tmp_path / "starts").read_text() == "xxxx"  # one that served, three in vain
    said = capfd.readouterr().out
    assert "status 3, and is started again in 0.04 s" in said and "status 3, 3 times before it served" in said
    status = Path(f"/proc/{(tmp_path / 'child').read_text()}/status")
    assert not status.exists() or "zombie" in status.read_text()
    assert signal.getsignal(signal.SIGINT) is interrupt


def test_a_server_that_has_failed_is_not_ready_while_its_reader_still_ends(tmp_path):
    server = with_servers.Server(started(tmp_path, "import sys; sys.exit(1)"))
    server.process.wait()
    server.reader.join()
    still = threading.Thread(target=time.sleep, args=(1,), daemon=True)
    still.start()
    server.reader = still  # the thread that has set the event has not ended yet
    with pytest.raises(RolloutError, match="did not start"):
        server.wait_ready(time.monotonic() + 60)


def test_a_server_that_is_stopped_while_it_starts_is_not_waited_for(tmp_path, signals, monkeypatch):
    """It ends itself after --start-timeout, unless it is stopped or its first imports hang: nothing ended the wait."""
    monkeypatch.setattr(with_servers, "BEAT", 0.05)
    monkeypatch.setattr(with_servers, "GRACE", 0.5)
    stopped = started(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)")
    with pytest.raises(RolloutError, match="a rollout server neither serves nor ends, 0.5 seconds after .* OWN=its"):
        supervise([stopped], started(tmp_path, TRAINER, "0"), again=False, start=0.2)
    assert not (tmp_path / "training").exists()
