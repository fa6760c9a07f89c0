"""Stage `device_tests` of gpu/check.py: the library's own tests of what the device computes (`pytest -m device`)."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu.common import Part, Setting, seconds_left
from benchmarks.gpu.pytest_lines import FILE

ROOT = Path(__file__).parents[2]
TO_REPORT = 6  # seconds before the stage's limit at which the tests are stopped


def parts(setting: Setting) -> Iterator[Part]:
    yield "pytest", run


def run() -> dict:
    """Counts, seconds, and of each failure its name and message; also of a run that was stopped."""
    command = [sys.executable, "-m", "pytest", "-m", "device", "tests/device", "-q", "-p", "no:cacheprovider"]
    command += ["-p", "benchmarks.gpu.pytest_lines"]
    if importlib.util.find_spec("xdist") and (os.cpu_count() or 1) >= 8:
        command += ["-n", "4", "--dist", "worksteal"]  # most of the time is starts of vLLM, on one core each
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "lines.jsonl"
        environment = {**os.environ, FILE: str(file)}
        try:
            limit = max(1.0, seconds_left() - TO_REPORT)
            output = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit)
            stopped = None
        except subprocess.TimeoutExpired:
            stopped = f"stopped after {limit:.0f} seconds; the tests that are not counted had not ended"
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    if not lines:
        raise SystemExit(stopped or f"pytest ended with {output.returncode}: {output.stdout[-1000:]}")
    slowest = sorted(lines, key=lambda line: -line["seconds"])[:5]
    found = {"tests": len(lines), **Counter(line["outcome"] for line in lines)}
    found |= {"seconds": round(time.perf_counter() - start, 1)}
    found |= {"slowest": {line["test"]: line["seconds"] for line in slowest}}
    broken = {line["test"]: line["message"] for line in lines if line["outcome"] == "failed"}
    if stopped:
        found["stopped"] = stopped
        found["ended"] = [line["test"] for line in lines]
    if broken or stopped or output.returncode != 0:
        found["failed"] = broken or stopped or output.stdout[-1000:]
    return found
