"""Starts a module of the tests on two processes (gloo)."""

from pathlib import Path

import torch

from tests.warm import run_ranks


def run_on_two(module: str, folder: Path, *arguments: str) -> list:
    """What the two processes wrote as `folder/rank<r>.pt`; module: `tests.trainers.x`. arguments: its own;
    the folder is put second.

    Fails with the end of their output if one of them does.
    """
    first, *rest = arguments
    run_ranks(module, first, str(folder), *rest, logs=folder)
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]
