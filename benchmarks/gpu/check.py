"""What the library does on one GPU, in less than eight minutes: stage by stage, a line of JSON each.

    python benchmarks/gpu/check.py --output gpu.jsonl --summary gpu.md
    python benchmarks/gpu/check.py --stages machine pairs
    python benchmarks/gpu/check.py --stages several
    python benchmarks/gpu/check.py --device cpu --small

Stages: `machine`, `device_tests`, `rollouts`, `servers`, `pairs`, `on_policy`, `memory`, and only where it is named
`several`, for several GPUs (docs/hardware.md says more).
Each is a process of its own with a time limit (`TURNS`; `WHOLE` for all; ten times as long on a CPU), so that one
which fails, hangs or runs out of memory leaves the next alone. Those that prove something run beside each other, for
most of their time are starts of vLLM on one core; those that time something against a rival run alone. A stage is made
of parts, the most important first. Its line has what each part found as far as it came, of a part that failed the end
of its traceback, and of a stage that ran out of time the part in which it was. The exit status is 1 if a stage failed
or ran out of time.

`--small`: tiny shapes, to see that everything runs; its numbers say nothing about speed.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

TURNS = (
    {"machine": 15},
    {"device_tests": 175, "rollouts": 175, "servers": 175, "memory": 90},
    {"pairs": 150},
    {"on_policy": 240},
)
"""Stages that run beside each other, and the seconds that each may take on a GPU."""
WHOLE = 475
"""Seconds of all turns on a GPU. The last stage has what the others left, which is at least 135."""
NAMED = {"several": 450}
"""Stages that run only where they are named: they need several GPUs."""
STAGES = {name: seconds for turn in (*TURNS, NAMED) for name, seconds in turn.items()}
CPU_FACTOR = 10
RUNNING = "running"
"""The key of a part that began, between those of parts that ended."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes")
    parser.add_argument("--time-factor", type=float, default=1.0, help="times the limits, for a slower card")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=[s for s in STAGES if s not in NAMED])
    parser.add_argument("--output", type=Path, default=Path("gpu_check.jsonl"), help="one line per stage")
    parser.add_argument("--summary", type=Path, help="write a table of the lines to this file (Markdown)")
    parser.add_argument("--logs", type=Path, help="keep what the processes of the stages write in this folder")
    parser.add_argument("--parts", nargs="+", help="these parts of the stages alone, with those that they build on")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)  # in the process of that stage
    args = parser.parse_args()
    if args.stage:
        return run_parts_of(args)
    environment = {**os.environ, "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    if args.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    for folder in (args.output.parent, args.logs):
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
    factor = args.time_factor * (CPU_FACTOR if args.device == "cpu" else 1)
    lines = []
    ends = time.monotonic() + WHOLE * factor
    with args.output.open("w") as output:
        for turn in (*TURNS, NAMED):
            left = max(0.0, ends - time.monotonic())
            limits = {name: min(seconds * factor, left) for name, seconds in turn.items() if name in args.stages}
            for line in run_turn(limits, args, environment):
                lines.append(line)
                print(json.dumps(line), file=output, flush=True)
                print(json.dumps(line), flush=True)
    if args.summary:
        from benchmarks.gpu.summary import table

        args.summary.write_text(table(lines))
    return int(any(line["status"] not in ("ok", "skipped") for line in lines))


def run_turn(limits: dict[str, float], args: argparse.Namespace, environment: dict[str, str]) -> Iterator[dict]:
    """The lines of stages that run beside each other, as they end."""
    if not limits:
        return
    with ThreadPoolExecutor(len(limits)) as pool:
        running = [pool.submit(run_stage, name, args, limit, environment) for name, limit in limits.items()]
        for done in as_completed(running):
            line = done.result()
            yield line | {"beside": [name for name in limits if name != line["stage"]]}


def run_stage(name: str, args: argparse.Namespace, limit: float, environment: dict[str, str]) -> dict:
    """The line of a stage, which ran in a process (and a process group) of its own."""
    from align.reward_models.sandbox import end_session

    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found, errors = Path(folder) / "parts.jsonl", (args.logs or Path(folder)) / f"{name}.txt"
        command = [sys.executable, __file__, "--stage", name, "--device", args.device, "--output", str(found)]
        command += ["--small"] * args.small + (["--parts", *args.parts] if args.parts else [])
        with errors.open("wb") as stream:
            process = subprocess.Popen(
                command, env={**environment, "ALIGN_STAGE_ENDS": str(time.time() + limit)},
                stdout=stream, stderr=stream, cwd=ROOT, start_new_session=True,
            )  # fmt: skip
            try:
                code = process.wait(timeout=limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                end_session(process)
        parts = [json.loads(line) for line in found.read_text().splitlines()] if found.exists() else []
        output_tail = errors.read_text(errors="replace").splitlines()[-12:]
    result = {key: value for part in parts for key, value in part.items()}
    running = result.pop(RUNNING, None)
    line = {"stage": name, "status": status(code, result), "seconds": round(time.perf_counter() - start, 1)}
    line |= {
        "limit": round(limit, 1),
        "device": args.device,
        "small": args.small,
        "card": result.pop("card", "unknown"),
    }
    line["result"] = result
    if code is None or code != 0:
        line |= {"stopped_in": running, "output_tail": output_tail}
    return line


def status(code: int | None, result: dict) -> str:
    if code is None:
        return "timed out"
    values = [value for name, value in result.items() if name != "card"]
    if code != 0 or any(isinstance(value, dict) and "failed" in value for value in values):
        return "failed"
    return "skipped" if all(isinstance(value, str) for value in values) else "ok"


def run_parts_of(args: argparse.Namespace) -> int:
    """In the stage's process: the parts in turn, each written as it ends."""
    from benchmarks.gpu.common import Setting, run_parts

    setting = Setting(args.device, args.small)
    stage = importlib.import_module(f"benchmarks.gpu.{args.stage}")
    with args.output.open("a") as output:
        parts = stage.parts(setting)
        if args.parts:
            parts = (part for part in parts if part[0] in args.parts)
        for part in run_parts(setting, parts):
            print(json.dumps(part), file=output, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
