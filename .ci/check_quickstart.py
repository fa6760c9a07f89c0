"""Check that a quickstart left a report and a summary whose numbers exist."""

import json
import math
import re
import sys
from pathlib import Path

from align.evaluation.summary import read_summary
from align.quickstart.parts import RUNS

folder = Path(sys.argv[1])
summary = read_summary(folder)
for kind, axis in (("best_of_n", "n"), ("runs", "step")):
    for name, curve in summary[kind].items():
        for key in (axis, "kl", "proxy", "gold"):
            values = curve[key]
            assert len(values) > 1 and all(math.isfinite(value) for value in values), (kind, name, key, values)
assert set(summary["runs"]) == set(RUNS), summary["runs"].keys()
assert summary["phases"] and all(seconds >= 0 for seconds in summary["phases"].values())
report = (folder / "report.html").read_text()
figures = re.findall(r'<script type="application/json" data-curves="[^"]+">(.*?)</script>', report)
assert len(figures) > 3 and all(
    curve["x"] and curve["y"] for figure in figures for curve in json.loads(figure)["curves"]
)
assert "http://" not in report.replace("http://www.w3.org", "")
print(f"{folder}/report.html: {len(summary['best_of_n'])} best-of-n curves, {len(summary['runs'])} runs")
