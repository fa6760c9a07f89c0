"""Stage `device_tests` of gpu/check.py: the library's own tests of what the device computes (`pytest -m device`)."""

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.gpu.common import Part, Setting

ROOT = Path(__file__).parents[2]


def parts(setting: Setting) -> Iterator[Part]:
    yield "pytest", run


def run() -> dict:
    """Counts, seconds, and of each failure its name and message."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "device", "tests/device", "-q", f"--junitxml={report}"]
        if importlib.util.find_spec("xdist") and (os.cpu_count() or 1) >= 8:
            command += ["-n", "4", "--dist", "worksteal"]  # most of the time is starts of vLLM, on one core each
        output = subprocess.run(
            [*command, "-p", "no:cacheprovider"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if not report.exists():
            raise SystemExit(f"pytest ended with {output.returncode}: {output.stdout[-1000:]}")
        suite = ElementTree.parse(report).getroot().find("testsuite")
    counts = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
    broken = {
        case.get("name"): (child.get("message") or "")[:400]
        for case in suite.iter("testcase")
        for child in case
        if child.tag in ("failure", "error")
    }
    slowest = sorted(((float(case.get("time")), case.get("name")) for case in suite.iter("testcase")), reverse=True)[:5]
    found = {**counts, "seconds": float(suite.get("time")), "slowest": {name: time for time, name in slowest}}
    if broken or output.returncode != 0:
        found["failed"] = broken or output.stdout[-1000:]
    return found
