"""Which checkpoints `save_total_limit` leaves, and what must be on the disk before one is deleted."""

import errno
import os
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback

from align.distributed.checkpoints import (
    checksums,
    damage,
    newest_whole,
    remove_older,
    whole_folder,
    write_manifest,
)
from align.errors import TrainingError
from align.quickstart.workspace import Workspace
from align.trainers.core import saving
from align.trainers.sft import SFTTrainer
from tests.trainers.tiny_runs import demonstrations, sft_config
from tests.trainers.two_processes import run_on_two


class ClockSetBack(TrainerCallback):
    """After each checkpoint the clock goes back by an hour: those that are there are of the future."""

    def on_save(self, args, state, control, **kwargs):
        for path in Path(args.output_dir).glob("checkpoint-*"):
            os.utime(path, (time.time() + 36000 - 3600 * state.global_step,) * 2)


def test_a_clock_that_is_set_back_deletes_no_new_checkpoint(policy, tmp_path):
    args = sft_config(tmp_path, save_strategy="steps", save_steps=1, max_steps=3, save_total_limit=1)
    SFTTrainer(policy, args, demonstrations(22), callbacks=[ClockSetBack()]).train()
    assert newest_whole(tmp_path).name == "checkpoint-3"


@pytest.mark.parametrize(
    ("step", "limit", "best", "left"),
    [
        (6, 2, None, [4, 6]),
        (6, 2, 2, [2, 6]),
        (6, 1, 2, [2, 6]),
        (4, 2, None, [2, 4]),  # 6 and 8 are of an earlier run, or damaged
        (4, 3, None, [2, 4, 6]),
        (2, 1, 8, [2, 8]),
        (2, None, None, [2, 4, 6, 8]),
    ],
)
def test_age_is_by_steps_and_the_best_is_known_by_any_path(step, limit, best, left, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in (2, 4, 6, 8)[: 3 if step == 6 else 4]:
        Path(f"run/checkpoint-{number}").mkdir(parents=True)
    remove_older(tmp_path / "run", step, limit, best and f"run/checkpoint-{best}")
    assert sorted(path.name for path in Path("run").iterdir()) == [f"checkpoint-{number}" for number in left]


@pytest.fixture
def disk(monkeypatch):
    """What was flushed to the disk, by inode, and for each folder that was deleted, what was not by then of the newest
    checkpoint: its files, its folders and the folder that it is in."""
    flushed, missing, fsync, rmtree = set(), {}, os.fsync, shutil.rmtree

    def flush(opened):
        fsync(opened)
        flushed.add(os.fstat(opened).st_ino)

    def delete(path, **options):
        new = newest_whole(path.parent)
        needed = [path.parent, new, *new.rglob("*")]
        missing[path.name] = [str(one) for one in needed if one.stat().st_ino not in flushed]
        rmtree(path, **options)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(shutil, "rmtree", delete)
    return flushed, missing


def test_a_checkpoint_is_on_the_disk_before_an_older_one_is_deleted(policy, tmp_path, disk):
    """Else a power loss could leave none that is whole."""
    args = sft_config(tmp_path, save_strategy="steps", save_steps=1, max_steps=4, save_total_limit=2)
    SFTTrainer(policy, args, demonstrations(22)).train()
    assert disk[1] == {"checkpoint-1": [], "checkpoint-2": []}


def test_all_processes_flush_and_folders_too(tmp_path, disk):
    """Shards are in folders of their own."""
    for step in (1, 2):
        folder = tmp_path / f"checkpoint-{step}"
        (folder / "optimizer_0").mkdir(parents=True)
        for number in range(5):
            (folder / "optimizer_0" / f"{number}.distcp").write_text("shard")
        shares = [checksums(folder, rank=rank, processes=2, flushed=True) for rank in (0, 1)]
        write_manifest(folder, shares[0] | shares[1])
    remove_older(tmp_path, 2, 1, None)
    assert disk[1] == {"checkpoint-1": []}


def test_no_run_waits_for_the_disk_while_nothing_is_deleted(policy, tmp_path, disk):
    args = sft_config(tmp_path, save_strategy="steps", save_steps=1, max_steps=2, save_total_limit=2)
    SFTTrainer(policy, args, demonstrations(22)).train()
    weights = (tmp_path / "checkpoint-2" / "model.safetensors").stat().st_ino
    assert weights not in disk[0] and not disk[1]


def test_a_disk_that_fails_then_leaves_the_older_one(policy, tmp_path, monkeypatch):
    """Some systems say only there that it is full."""
    fsync, failing = os.fsync, []

    def flush(opened):
        if failing and os.fstat(opened).st_size > 1000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(opened)

    class Full(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            failing.append(state.global_step)

    monkeypatch.setattr(os, "fsync", flush)
    args = sft_config(tmp_path, save_strategy="steps", save_steps=1, max_steps=4, save_total_limit=1)
    with pytest.raises(TrainingError, match="checkpoint-2 cannot be written: No space left"):
        SFTTrainer(policy, args, demonstrations(22), callbacks=[Full()]).train()
    assert damage(tmp_path / "checkpoint-1") is None
    monkeypatch.undo()
    args = sft_config(tmp_path, save_strategy="steps", save_steps=1, max_steps=4, save_total_limit=1)
    SFTTrainer(policy, args, demonstrations(22)).train("auto")
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]


FULL = "cannot be written: No space left"


def test_a_disk_that_is_full_for_one_process_ends_all(policy, tmp_path):
    """The others waited for it in a collective until it was gone, and named the network."""
    for found in run_on_two("tests.trainers.core.full_disk_ranks", tmp_path, policy):
        for case, said in found.items():
            why = "process 0 could not write its part of .*: MemoryError: no memory" if "memory" in case else FULL
            assert "checkpoint-2" in said and re.search(why, said), (case, said)
            assert newest_whole(tmp_path / case).name == "checkpoint-1"


def test_a_full_disk_is_known_by_what_torch_says_and_no_further_file_is_tried(tmp_path, monkeypatch):
    tried, trainer = [], SimpleNamespace()

    def save(what, to):
        tried.append(to)
        raise RuntimeError("basic_ios::clear: iostream error")

    monkeypatch.setattr(torch, "save", save)
    with saving.errors_kept(trainer, tmp_path) as errors:
        torch.save({}, "optimizer.pt")
        torch.save({}, "scheduler.pt")
        assert trainer.disk_errors is errors and tried == ["optimizer.pt"]
    assert torch.save is save and trainer.disk_errors is None
    with pytest.raises(TrainingError, match="no room on the disk"):
        errors.raise_in_all()


def test_a_disk_that_cannot_flush_is_no_error(tmp_path, monkeypatch):
    def flush(opened):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    for step in (1, 2):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "file").write_text("content")
    monkeypatch.setattr(os, "fsync", flush)
    assert checksums(tmp_path / "checkpoint-2", flushed=True)
    remove_older(tmp_path, 2, 1, None)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


@pytest.fixture
def on_disk(monkeypatch):
    """Files and folders that are flushed, and `named` when something gets its name, in order."""
    events, fsync, replace, rename = [], os.fsync, os.replace, Path.rename

    def flush(opened):
        events.append(Path(os.readlink(f"/proc/self/fd/{opened}")).name)
        fsync(opened)

    def named(move):
        return lambda *paths: (events.append("named"), move(*paths))

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", named(replace))
    monkeypatch.setattr(Path, "rename", named(rename))
    return events


def test_a_folder_gets_its_name_when_it_is_on_the_disk(tmp_path, on_disk):
    with whole_folder(tmp_path / "out") as folder:
        (folder / "sub").mkdir(parents=True)
        (folder / "sub" / "weights").write_text("content")
    assert sorted(on_disk[:3]) == ["out.partial", "sub", "weights"] and on_disk[3:] == ["named", tmp_path.name]
    with pytest.raises(OSError), whole_folder(tmp_path / "other") as folder:
        folder.mkdir()
        raise OSError(errno.ENOSPC, "")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_phase_of_the_quickstart_is_finished_when_its_files_are_on_the_disk(tmp_path, on_disk):
    space = Workspace(tmp_path, {})
    space.path("sft", "weights").write_text("content")
    on_disk.clear()
    space.record("sft", {}, 1.0)
    assert on_disk.index("weights") < on_disk.index("phases.json.tmp") < on_disk.index("named")
    assert Workspace(tmp_path, {}).finished("sft")


def test_the_best_checkpoint_is_on_the_disk_when_the_last_is_deleted(policy, tmp_path, monkeypatch):
    """With a limit of 1 transformers deletes the last one at the end of training, and nothing was deleted before."""
    flushed = {}

    def watched(folder, **options):
        flushed[folder.name] = options["flushed"]
        return checksums(folder, **options)

    monkeypatch.setattr("align.trainers.core.trainer.checksums", watched)
    args = sft_config(
        tmp_path, save_strategy="steps", save_steps=1, max_steps=2, save_total_limit=1, eval_strategy="steps",
        eval_steps=1, metric_for_best_model="eval_loss", greater_is_better=True, learning_rate=1e-2,
    )  # fmt: skip
    SFTTrainer(policy, args, demonstrations(22), demonstrations(8)).train()
    assert newest_whole(tmp_path).name == "checkpoint-1" and flushed["checkpoint-1"]
