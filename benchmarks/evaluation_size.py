"""The commands of evaluation at the size of real use: CPU seconds, peak memory, and the size of what they write.

    python benchmarks/evaluation_size.py [CASE ...] [--small] [--out benchmarks/results/evaluation_size.json]

Each case is one `align` command in a process of its own, on made-up input that is written before and not measured:
memory is the largest resident size of the process, CPU seconds are those of user and system. `page_kib` is the size of
the HTML page, `folder_kib` of all that was written. The cases are in `CASES`, with their sizes; --small divides these
by 100, to see that the file works.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

WORDS = "the of a to and in that it is was for on with as his they be at one have this from or had by hot but some what"

MEMBERS = '''"""Five scores of a text: what all see, and what each sees alone."""

import zlib


def _score(text, member):
    return zlib.crc32(text.encode(), 0) / 2**32 + 0.5 * zlib.crc32(text.encode(), member + 1) / 2**32


''' + "\n\n".join(
    f"def member{i}(completions):\n    return [_score(text, {i}) for text in completions]\n" for i in range(5)
)  # fmt: skip


def texts(rng: np.random.Generator, count: int, words: int = 30) -> list[str]:
    known = np.array(WORDS.split())
    return [" ".join(known[row]) for row in rng.integers(len(known), size=(count, words))]


def write_evaluations(folder: Path, evaluations: int, prompts: int, *, rewards: int = 0, seed: int = 0) -> Path:
    """A run's evaluation file: gold rises and falls, the proxy rises; two samples an evaluation."""
    from align.evaluation.records import EvalWriter, _dump

    rng = np.random.default_rng(seed)
    names = [f"rewards/r{i}" for i in range(rewards)]
    settings = {"name": folder.name, "method": "rloo", "proxy": "rm", "gold": "judge", "seed": seed, "config": {}}
    writer = EvalWriter(folder, **settings)
    level = rng.normal(size=prompts)
    with open(writer.path, "a", encoding="utf-8") as file:
        for index in range(evaluations):
            share = index / max(evaluations - 1, 1)
            kl = 40 * share**1.5 * (1 + 0.1 * rng.normal(size=prompts))
            columns = {
                "kl": kl,
                "kl_k3": np.abs(kl),
                "proxy": 4 * share + level + rng.normal(size=prompts),
                "gold": 6 * share * (1.2 - share) + level + rng.normal(size=prompts),
                "length": 20 + 10 * share + rng.normal(size=prompts),
            }
            for number, name in enumerate(names):
                columns[name] = (2 + number - seed) * share + 0.3 * rng.normal(size=prompts)
            record = {"step": 10 * index, **{key: float(value.mean()) for key, value in columns.items()}}
            record["per_prompt"] = {key: [float(f"{x:.8g}") for x in value] for key, value in columns.items()}
            record["samples"] = [
                {"prompt": f"question {i}", "completion": f"answer {index}", "proxy": 1.0, "gold": 0.5}
                for i in range(2)
            ]
            file.write(_dump(record, writer.path))
    return folder


def overoptimization(folder: Path, evaluations: int, prompts: int) -> list[str]:
    return ["overoptimization", str(write_evaluations(folder / "run", evaluations, prompts))]


def proxy_points(folder: Path, evaluations: int, prompts: int) -> list[str]:
    runs = [write_evaluations(folder / f"run{i}", evaluations // 2, prompts, rewards=2, seed=i) for i in range(2)]
    return ["proxy-points", *map(str, runs)]


def bon(folder: Path, prompts: int, answers: int) -> list[str]:
    """Five proxies that share what is right and each have their own error, and two ensembles of them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)
    shape = (prompts, answers)
    truth = rng.normal(size=shape) + rng.normal(size=(prompts, 1))
    columns = {"prompt_id": np.repeat(np.arange(prompts), answers), "gold": truth.ravel()}
    for member in range(5):
        columns[f"rm{member}"] = (truth + rng.normal(size=shape)).ravel().astype(np.float32)
    path = folder / "scores.parquet"
    pq.write_table(pa.table(columns), path)
    proxies = [word for member in range(5) for word in ("--proxy", f"rm{member}")]
    return ["bon", str(path), *proxies, "--ensemble", "wco", "--ensemble", "uwo:0.5"]


def members(folder: Path) -> list[str]:
    (folder / "five_members.py").write_text(MEMBERS)
    return [f"{folder / 'five_members.py'}:member{i}" for i in range(5)]


def reward_pairs(folder: Path, pairs: int) -> list[str]:
    rng, path = np.random.default_rng(0), folder / "pairs.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for i, (chosen, rejected) in enumerate(zip(texts(rng, pairs), texts(rng, pairs), strict=True)):
            row = {"prompt": f"question {i}", "chosen": chosen, "rejected": rejected}
            file.write(json.dumps(row) + "\n")
    ensemble = f"{{type: ensemble, name: five, aggregation: mean, members: [{', '.join(members(folder))}]}}"
    return ["reward-eval", ensemble, members(folder)[0], "--data", str(path)]


def reward_completions(folder: Path, prompts: int, answers: int) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng, path = np.random.default_rng(0), folder / "completions.parquet"
    found = texts(rng, prompts * answers)
    names = [f"question {i}" for i in range(prompts) for _ in range(answers)]
    pq.write_table(pa.table({"prompt": names, "completion": found, "gold": rng.normal(size=len(found))}), path)
    return ["reward-eval", *members(folder), "--completions", str(path)]


def compare(folder: Path, pairs: int) -> list[str]:
    rng, files = np.random.default_rng(0), []
    for side in ("a", "b"):
        files.append(folder / f"{side}.jsonl")
        with open(files[-1], "w", encoding="utf-8") as file:
            for i, text in enumerate(texts(rng, pairs)):
                row = {"row": i, "sample": 0, "prompt": f"question {i}", "completion": text}
                file.write(json.dumps(row) + "\n")
    return ["compare", *map(str, files), "--rewards", *members(folder)[:2]]


def report(folder: Path, logs: int, evaluations: int) -> list[str]:
    """Two on-policy runs: 12 metrics a step, and evaluations of 32 prompts with their samples."""
    from align.evaluation.metrics_file import MetricsWriter, _line

    runs = []
    for run in range(2):
        rng = np.random.default_rng(run)
        runs.append(write_evaluations(folder / f"run{run}", evaluations, 32, seed=run))
        header = {"method": "rloo", "started": "2026", "max_steps": logs, "processes": 1, "settings": {"seed": run}}
        writer = MetricsWriter(runs[-1], header, None)
        values = rng.normal(size=(logs, 10))
        with open(writer.path, "a", encoding="utf-8") as file:
            for step, row in enumerate(values.tolist(), start=1):
                log = {"step": step, "at": 1.8e9 + step, "loss": row[0], "reward": row[1] + step / logs}
                log |= {f"rewards/r{i}": row[2 + i] for i in range(5)} | {"entropy": row[7], "kl": row[8] ** 2}
                file.write(_line(log | {"grad_norm": abs(row[9]), "time/train": 1.0}))
    return ["report", *map(str, runs)]


CASES: dict[str, tuple[Callable[..., list[str]], dict[str, int]]] = {
    "many evaluations": (overoptimization, {"evaluations": 100_000, "prompts": 32}),
    "many prompts": (overoptimization, {"evaluations": 50, "prompts": 100_000}),
    "both": (overoptimization, {"evaluations": 5_000, "prompts": 1_000}),
    "best of 256": (bon, {"prompts": 10_000, "answers": 256}),
    "pairs": (reward_pairs, {"pairs": 100_000}),
    "completions": (reward_completions, {"prompts": 12_500, "answers": 8}),
    "comparison": (compare, {"pairs": 100_000}),
    "long runs": (report, {"logs": 100_000, "evaluations": 1_000}),
    "proxy points": (proxy_points, {"evaluations": 20_000, "prompts": 32}),
}


def measure(case: str, folder: Path, small: bool) -> dict:
    make, sizes = CASES[case]
    if small:
        sizes = {key: max(value // 100, 32) if value > 256 else value for key, value in sizes.items()}
    argv = make(folder, **sizes)
    written = folder / "written"
    where = ["--output", str(written / "runs.html")] if make is report else ["--output_dir", str(written)]
    command = [sys.executable, "-m", "align.cli.main", *argv, *where]
    log, began = folder / "log.txt", time.perf_counter()
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{case}: {argv[0]} ended with {status}:\n{log.read_text()[-2000:]}")
    files = [path for path in written.rglob("*") if path.is_file()]
    pages = sum(path.stat().st_size for path in files if path.suffix == ".html")
    return {
        "command": argv[0],
        **sizes,
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_mib": round(usage.ru_maxrss / 1024),
        "page_kib": round(pages / 1024),
        "folder_kib": round(sum(path.stat().st_size for path in files) / 1024),
    }


def table(cases: dict[str, dict]) -> str:
    """The rows of docs/overoptimization.md."""
    measured = ("command", "seconds", "cpu_seconds", "peak_mib", "page_kib", "folder_kib")
    rows = []
    for found in cases.values():
        sizes = ", ".join(f"{size:,} {of}" for of, size in found.items() if of not in measured)
        page = f"{found['page_kib']:,} KiB" if found["page_kib"] else "none"
        cells = [f"`{found['command']}`", sizes, f"{found['cpu_seconds']:.0f}", f"{found['peak_mib']:,} MiB", page]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found = {}
    for case in args.cases or CASES:
        with tempfile.TemporaryDirectory() as folder:
            found[case] = measure(case, Path(folder), args.small)
        print(case, found[case], flush=True)
    result = {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "cpus": len(os.sched_getaffinity(0)),
        "cases": found,
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
