"""The numbers that a run logs, `<run>/metrics.jsonl`: written while it trains, beside whatever trackers it reports to.

The first line is a header, every further line one log (of training, or of an evaluation: its keys start with eval_):

    {"format": "align.metrics/1", "method", "started", "max_steps", "processes", "versions", "settings"}
    {"step", "at", "loss": 0.69, "learning_rate": 1e-6, "time/train": 1.5, ...}

`at` is the time in seconds since 1970. As with the evaluation file, a resumed run drops what came after its checkpoint
(that training is repeated), and a line counts when it is whole.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.errors import DataError
from align.evaluation.records import free_name

FORMAT = "align.metrics/1"
FILE_NAME = "metrics.jsonl"


@dataclass
class Metrics:
    """What a run has logged: the header, and one dict per log, in order."""

    header: dict[str, Any]
    logs: list[dict[str, float]]

    def curves(self) -> dict[str, tuple[list[float], list[float]]]:
        """(steps, values) by metric, in the order in which they were first logged."""
        found: dict[str, tuple[list[float], list[float]]] = {}
        for log in self.logs:
            for name, value in log.items():
                if name not in ("step", "at"):
                    steps, values = found.setdefault(name, ([], []))
                    steps.append(log["step"])
                    values.append(value)
        return found

    def phases(self) -> dict[str, float]:
        """Seconds of each phase of the main process, in all, the longest first."""
        totals: dict[str, float] = {}
        for log in self.logs:
            for name, value in log.items():
                if name.startswith("time/"):
                    totals[name[5:]] = totals.get(name[5:], 0.0) + value
        return dict(sorted(totals.items(), key=lambda item: -item[1]))


class MetricsWriter:
    """Appends to `<folder>/metrics.jsonl`; make one in the main process only. resume_step: as of `EvalWriter`."""

    def __init__(self, folder: str | Path, header: dict[str, Any], resume_step: int | None):
        self.path = Path(folder) / FILE_NAME
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [{"format": FORMAT, **header}]
        if self.path.exists():
            if resume_step is None:
                os.replace(self.path, free_name(self.path))
            else:
                before = read_metrics(self.path)
                kept = [before.header, *(log for log in before.logs if log["step"] <= resume_step)]
                kept[0]["max_steps"] = header["max_steps"]
        temporary = self.path.with_suffix(".jsonl.tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(temporary, self.path)

    def write(self, log: dict[str, float]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(log) + "\n")


def read_metrics(path: str | Path) -> Metrics:
    """Read what a run has logged (the file, or the run's folder); an unfinished last line is left out.

    Raises DataError naming the file and line.
    """
    path = Path(path)
    if path.is_dir():
        path = path / FILE_NAME
    if not path.exists():
        raise DataError(f"{path} does not exist: a run writes it while it trains")
    lines = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            lines.append(json.loads(line))
        except ValueError as error:
            raise DataError(f"{path}: line {number} is not valid JSON ({error})") from error
        if not isinstance(lines[-1], dict) or number > 1 and "step" not in lines[-1]:
            raise DataError(f"{path}: line {number} is not a log of a run")
    if not lines or lines[0].get("format") != FORMAT:
        raise DataError(f"{path}: line 1 is not the header of a run's logs (format {FORMAT!r})")
    return Metrics(lines[0], lines[1:])
