"""`align launch`: the exact commands and batch files, and what is refused."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from align.cli.launch import SETUPS
from align.cli.main import main
from align.config import configs_dir

SETUP_FILES = configs_dir() / "accelerate"


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("method: sft\nlearning_rate: 1e-5\n")
    return str(path)


def launch(*arguments):
    return main(["launch", *map(str, arguments)])


def test_one_machine(config, capsys):
    assert launch(config, "--setup", "fsdp2", "--num-processes", 8, "--learning_rate", "5e-7", "--dry-run") == 0
    said = capsys.readouterr()
    assert said.err.endswith(f": align sft --config {config} --learning_rate 5e-7 --processes 8 --dry-run\n")
    assert said.out == (
        f"{sys.executable} -m align.cli.launcher --config_file {SETUP_FILES}/fsdp2.yaml --num_processes 8 "
        f"--num_machines 1 --main_process_port 29500 --module align sft --config {config} --learning_rate 5e-7\n"
    )


def test_several_machines_and_quoting(config, capsys):
    rank = ["--nodes", 2, "--node-rank", 1, "--main-address", "node0", "--main-port", 1234]
    assert launch(config, "--num-processes", 16, *rank, "--run_name", "it's mine", "--dry-run") == 0
    assert capsys.readouterr().out == (
        f"{sys.executable} -m align.cli.launcher --config_file {SETUP_FILES}/ddp.yaml --num_processes 16 "
        "--num_machines 2 --machine_rank 1 --main_process_ip node0 --main_process_port 1234 --module align sft "
        f"--config {config} --run_name 'it'\"'\"'s mine'\n"
    )


def test_processors_instead_of_gpus(config, capsys):
    assert launch(config, "--cpu", "--num-processes", 2, "--dry-run") == 0
    assert capsys.readouterr().out.endswith(f"--module align sft --config {config} --use_cpu true\n")


def test_a_run_that_fails_has_the_last_word_but_one(config):
    """No traceback of the launcher behind the run's own sentence, and the run's own exit status."""
    command = [sys.executable, "-m", "align", "launch", config, "--cpu", "--num-processes", "2", "--learning_rate=-1"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert ended.stderr.count("learning_rate must be ") == 1  # of two processes
    assert ended.stderr.splitlines()[-1].startswith("align launch: process ") and "status 2" in ended.stderr
    assert "Traceback" not in ended.stderr and "ChildFailedError" not in ended.stderr


def test_slurm_file(config, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert launch(config, "--nodes", 2, "--num-processes", 16, "--slurm", "job.sbatch", "--run_name", "it's") == 0
    assert "sbatch job.sbatch" in capsys.readouterr().out
    text = Path("job.sbatch").read_text()
    lines = text.splitlines()
    for line in (
        "#!/bin/bash",
        "#SBATCH --job-name=align-sft",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --cpus-per-task=64",
        "#SBATCH --requeue",
        "#SBATCH --signal=B:USR1@300",
        f"cd {tmp_path}",
    ):
        assert line in lines
    assert "--num_processes 16 --num_machines 2 --machine_rank $SLURM_NODEID --main_process_ip $MAIN_ADDRESS" in text
    assert "--resume_from_checkpoint auto" in text
    # bash reads it, and what `srun` gets to run is one argument in which the run's own quotes survived
    assert subprocess.run(["bash", "-n", "job.sbatch"]).returncode == 0
    (srun,) = [line for line in lines if line.startswith("srun ")]
    script = f"SLURM_CPUS_PER_TASK=64; srun() {{ printf '%s\\n' \"$@\"; }}; {srun.removesuffix(' &')}"
    shown = subprocess.run(["bash", "-c", script], capture_output=True, text=True).stdout.splitlines()
    # which srun of SLURM 22.05 to 23.02 does not take over from the job
    assert shown[:4] == ["--kill-on-bad-exit=1", "--cpus-per-task=64", "bash", "-c"] and len(shown) == 5
    words = subprocess.run(["bash", "-c", f"printf '%s\\n' {shown[4]}"], capture_output=True, text=True).stdout
    assert "it's" in words.splitlines()


def test_slurm_file_follows_the_given_resume_and_processors(config, capsys):
    extra = ["--cpu", "--slurm", "-", "--dry-run", "--resume_from_checkpoint", "runs/x/checkpoint-5"]
    assert launch(config, "--num-processes", 4, *extra) == 0
    text = capsys.readouterr().out
    assert "--resume_from_checkpoint runs/x/checkpoint-5" in text and "auto" not in text
    assert "gpus-per-node" not in text and "#SBATCH --cpus-per-task=32" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-processes", 15, "--nodes", 2, "--slurm", "x"], "and 15 do not divide over 2 nodes"),
        (["--num-processes", 16, "--nodes", 2], "several --nodes need --node-rank and --main-address on each"),
        (["--nodes", 2, "--slurm", "x"], "give --num-processes"),
        (["--cpu"], "give --num-processes"),
        (["--cpu", "--num-processes", 2, "--setup", "fsdp2"], "--cpu runs with --setup ddp only"),
        (["--num-processes", 0], "--num-processes and --nodes count from 1"),
        (["--num-processes", 2, "--node-rank", 1], "--node-rank goes from 0 to 0"),
        (["--num-processes", 2, "--node-rank", 0], "--node-rank is for several --nodes"),
        (["--num-processes", 2, "--main-address", "a"], "--main-address is for several --nodes"),
        (["--num-processes", 2, "--rollout-tensor-parallel", 4], "--rollout-tensor-parallel does nothing without"),
        (["--num-processes", 2, "--rollout-start-timeout", 9], "--rollout-start-timeout does nothing without"),
        (["--num-processes", 2, "--rollout-port", 9], "--rollout-port does nothing without --rollout-gpus"),
        (["--num-processes", 2, "--node-addresses", "x,y"], "--node-addresses does nothing without --rollout-gpus"),
        (["--num-processes", 2, "--cpus-per-process", 8], "--cpus-per-process does nothing without --slurm"),
        (["--num-processes", 2, "--slurm", "x", "--cpus-per-process", 0], "--cpus-per-process counts from 1, not 0"),
        (["--num-processes", 2, "--slurm", "x", "--main-port", 1234], "--main-port is found by the batch file"),
        (["--num-processes", 2, "--main-port", 70000], "--main-port 70000: ports go from 1 to 65535"),
        (["--num-processes", 2, "--slurm", "x", "--learning_rat", 1], "unknown key --learning_rat; nearest valid: --"),
        (["--num_processes=2"], "--num_processes is --num-processes here"),
        (["--num-processes", 2, "--dry_run"], "--dry_run is --dry-run here"),
        (["--num-processes", 2, "--method", "remax"], "line 1: the file is for 'sft', --method says 'remax'"),
    ],
)
def test_refusals_are_one_line(config, capsys, arguments, message):
    assert launch(config, *arguments, "--dry-run") == 2
    error = capsys.readouterr().err
    assert error.startswith("align: error: ") and error.count("\n") == 1
    assert message in error


def test_no_more_processes_than_gpus(config, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert launch(config, "--num-processes", 8) == 2
    assert "no GPU is found on this machine: add --cpu" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    machines = ["--nodes", 2, "--node-rank", 0, "--main-address", "a"]
    assert launch(config, "--num-processes", 16, *machines) == 2
    assert "8 processes need 8 GPUs of this machine, which shows 4" in capsys.readouterr().err


def test_a_file_without_a_method(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("learning_rate: 1e-5\n")
    assert launch(path, "--num-processes", 2, "--dry-run") == 2
    assert "does not name its method" in capsys.readouterr().err
    assert launch(path, "--method", "reward", "--num-processes", 2, "--dry-run") == 0
    assert "--module align reward --config" in capsys.readouterr().out
    assert launch(path, "--method", "dop", "--num-processes", 2, "--dry-run") == 2
    assert "there is no method 'dop'; nearest: dpo; the methods are sft, reward, dpo" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="DeepSpeed is installed here")
@pytest.mark.parametrize("setup", ["zero2", "zero3"])
def test_deepspeed_setups_say_how_to_install_it(config, capsys, setup):
    assert launch(config, "--setup", setup, "--num-processes", 2) == 2
    assert "pip install deepspeed" in capsys.readouterr().err


@pytest.mark.parametrize("setup", SETUPS)
def test_accelerate_reads_every_setup(setup):
    from accelerate.commands.config.config_args import load_config_from_file

    file = SETUP_FILES / f"{setup}.yaml"
    loaded = load_config_from_file(str(file))
    kind = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}[setup]
    assert loaded.distributed_type == kind
    assert loaded.mixed_precision == "no"  # the run's own bf16 and fp16 decide
    written = yaml.safe_load(file.read_text())
    if setup == "fsdp2":
        assert loaded.fsdp_config["fsdp_version"] == 2
    if kind == "DEEPSPEED":
        assert written["deepspeed_config"]["zero_stage"] == int(setup[-1])


def test_options_of_the_run_before_its_file_are_told_their_place(config, capsys):
    assert main(["launch", "--learning_rate", "1e-5", str(config), "--num-processes", "2", "--dry-run"]) == 2
    assert f"after the config file: align launch {config} --OPTION" in capsys.readouterr().err
