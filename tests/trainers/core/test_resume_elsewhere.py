"""Going on from a checkpoint of other processes, or of another way to share the model out: the same run, or a refusal
that every process makes at once."""

import time
from pathlib import Path

import pytest
import torch

from align.trainers.core.lock import holding
from tests.trainers.core.resume_ranks import run
from tests.warm import run_ranks


def on_ranks(policy, folder: Path, setup: str, count: int = 2, resumed: str | Path = "") -> list[dict]:
    module = "tests.trainers.core.resume_ranks"
    run_ranks(module, policy, str(folder), setup, str(resumed), logs=folder, count=count)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(count)]


@pytest.fixture(scope="module")
def runs(policy, tmp_path_factory):
    """By setup: what was logged, and the checkpoint after two of four steps."""
    folder = tmp_path_factory.mktemp("runs")
    found = {"one": run(policy, folder / "one" / "run")}
    found |= {setup: on_ranks(policy, folder / setup, setup)[0] for setup in ("ddp", "fsdp2")}
    return {setup: (ran["loss"], folder / setup / "run" / "checkpoint-2") for setup, ran in found.items()}


def refusal(found: list[dict]) -> str:
    """What every process says."""
    (said,) = {ran["refused"] for ran in found}
    return said


@pytest.mark.parametrize(
    ("wrote", "setup", "said"),
    [
        ("fsdp2", "ddp", "written with FSDP (FULL_STATE_DICT), and this run trains with neither FSDP nor DeepSpeed"),
        ("ddp", "fsdp2", "written with neither FSDP nor DeepSpeed, and this run trains with FSDP (FULL_STATE_DICT)"),
        ("one", "fsdp2", "written with neither FSDP nor DeepSpeed, and this run trains with FSDP (FULL_STATE_DICT)"),
    ],
)
def test_another_way_to_share_the_model_out_is_refused(runs, policy, tmp_path, wrote, setup, said):
    assert said in refusal(on_ranks(policy, tmp_path, setup, resumed=runs[wrote][1]))


def test_one_process_does_not_read_shards(runs, policy, tmp_path):
    found = run(policy, tmp_path, str(runs["fsdp2"][1]))
    assert "was written with FSDP (FULL_STATE_DICT), and this run trains with neither" in found["refused"]


@pytest.mark.parametrize("setup", ["ddp", "fsdp2"])
def test_more_processes_are_refused_in_all(runs, policy, tmp_path, setup):
    start = time.monotonic()
    found = on_ranks(policy, tmp_path, setup, 3, runs[setup][1])
    assert "written by 2 processes, and 3 cannot go on from it (align_state_2.pt is missing)" in refusal(found)
    assert time.monotonic() - start < 60  # none waits for one that has gone


def test_fewer_processes_go_on_with_shards(runs, policy, tmp_path):
    (whole, *_) = on_ranks(policy, tmp_path / "three", "fsdp2", 3)
    for ran in on_ranks(policy, tmp_path / "two", "fsdp2", 2, tmp_path / "three" / "run" / "checkpoint-2"):
        assert ran["loss"] == pytest.approx(whole["loss"], rel=1e-5)


def test_a_folder_in_use_is_refused_in_all(policy, tmp_path):
    with holding(tmp_path / "run"):
        assert "TrainingError: another run trains in " in refusal(on_ranks(policy, tmp_path, "ddp"))
