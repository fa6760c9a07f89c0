"""Disks that are full or read-only: one sentence, and the run goes on exactly where there is room again."""

import os
import resource
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

from benchmarks.faults import kills, processes, world
from benchmarks.faults.tally import Tally

LINES = ("sft", "dpo, cached reference", "ppo", "sft, LoRA", "rloo, constrained")


def limited(argv: list[str], size: int):
    """Train where no file may have more than `size` bytes: writing more is an error of the system's."""

    def train():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        return world.train(argv)

    return train


def as_nobody(argv: list[str], cache: Path):
    """Train as a user to whom the folder of the run does not belong. cache: for data sets, which any user may write."""
    cache.mkdir()
    cache.chmod(0o777)

    def train():
        import datasets

        from align.cli.main import build_parser

        datasets.config.HF_DATASETS_CACHE = cache
        build_parser()  # imports what another user may not be allowed to read
        before = os.geteuid()
        if before == 0:
            os.seteuid(65534)
        try:
            return world.train(argv)
        finally:
            os.seteuid(before)

    return train


@contextmanager
def small_disk(folder: Path, size: str):
    """A file system of this size at `folder`; yields whether it could be mounted (which needs rights)."""
    folder.mkdir(parents=True, exist_ok=True)
    mounted = not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], capture_output=True
    ).returncode
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def run(tally: Tally, work: Path, data: Path, seed: int, number: int, until: float) -> None:
    rng = world.draw(seed, "disk")
    straight = {}
    work.mkdir(parents=True)
    _closed(tally, work, data)
    for index in range(number):
        if time.monotonic() > until:
            return
        name = LINES[index % len(LINES)]
        if name not in straight:
            output = work / "straight" / name.replace(", ", "_") / "run"
            whole = kills.finish(output, kills.start(name, data, output))
            if whole.problem or whole.refused or whole.killed:
                raise SystemExit(f"{name} with room enough: {whole}")
            straight[name] = kills.result(output)
        output = work / f"full{index}" / "run"
        size = int(2 ** rng.uniform(8, 20))
        ended = processes.in_child(output.parent / "log0", limited(world.command(name, data, output), size))
        what = f"{name}, no file above {size} bytes (in {output})"
        _judge(tally, "disk full", ended, what)
        if not (ended.problem or ended.killed):
            again = kills.finish(output, kills.start(name, data, output))
            problem = again.problem or again.refused or kills.difference(straight[name], kills.result(output))
            tally.add("resumed when there is room", "wrong" if problem else "exact", f"{what}: {problem}")
    with small_disk(work / "small", "1m") as mounted:
        if mounted:
            argv = world.command("sft", data, work / "small" / "run")
            _judge(
                tally, "disk full", processes.in_child(work / "small_log", lambda: world.train(argv)), "a disk of 1 MiB"
            )


def _closed(tally: Tally, work: Path, data: Path) -> None:
    """Folders in which nothing can be written."""
    file = work / "a_file"
    file.write_text("no folder")
    closed = work / "closed"
    closed.mkdir(mode=0o555)
    for path in data.rglob("*"):  # safetensors writes files for their owner alone
        path.chmod(path.stat().st_mode | 0o044)
    for what, output, train in (
        ("output_dir is below a file", file / "run", world.train),
        ("output_dir is a file", file, world.train),
        ("output_dir is another's", closed / "run", None),
        ("output_dir is of no disk", Path("/proc/run"), world.train),
        ("a name that is too long", work / ("x" * 300), world.train),
    ):
        argv = world.command("sft", data, output)
        function = as_nobody(argv, work / "cache") if train is None else lambda argv=argv: world.train(argv)
        ended = processes.in_child(work / "closed_log", function)
        _judge(tally, "read-only", ended, what, output)


def _judge(tally: Tally, area: str, ended: processes.Ended, what: str, closed: Path | None = None) -> None:
    """closed: an output folder that cannot be, which the sentence must name."""
    if ended.refused is not None:
        said = ended.refused.isprintable() and (closed is None or str(closed) in ended.refused)
        tally.add(area, "refused" if said else "wrong", f"{what}: {ended.refused!r}")
    else:
        fine = not ended.problem and not ended.killed and closed is None
        tally.add(area, "exact" if fine else "wrong", f"{what}: {ended}")
