"""A pytest plugin: a line of JSON per test as it ends, so that a run that is stopped leaves what it has found."""

import json
import os
from pathlib import Path

FILE = "ALIGN_TEST_LINES"


def pytest_runtest_logreport(report):
    if "PYTEST_XDIST_WORKER" in os.environ or (report.when != "call" and report.outcome == "passed"):
        return  # of xdist's processes, the first one hears of every test
    line = {"test": report.nodeid.rpartition("/")[2], "outcome": report.outcome, "seconds": round(report.duration, 2)}
    if report.failed:
        line["message"] = str(report.longrepr)[-1500:]
    with Path(os.environ[FILE]).open("a") as file:
        print(json.dumps(line), file=file)
