"""Starts a module of the tests on two processes (gloo)."""

import os
import subprocess
import sys
from pathlib import Path

import torch


def run_on_two(module: str, folder: Path, *arguments: str) -> list:
    """What the two processes wrote as `folder/rank<r>.pt`; module: `tests.trainers.x`. arguments: its own;
    the folder is put second.

    Fails with the end of their output if one of them does.
    """
    folder.mkdir()
    first, *rest = arguments
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "-m", module]
    result = subprocess.run(
        [*command, first, str(folder), *rest],
        env={**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]
