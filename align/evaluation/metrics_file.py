"""The numbers that a run logs, `<run>/metrics.jsonl`: written while it trains, beside whatever trackers it reports to.

The first line is a header, every further line one log (of training, or of an evaluation: its keys start with eval_):

    {"format": "align.metrics/1", "method", "started", "max_steps", "processes", "versions", "settings", "earlier"}
    {"step", "at", "loss": 0.69, "learning_rate": 1e-6, "time/train": 1.5, ...}

`at` is the time in seconds since 1970; a number that is not finite is null. As with the evaluation file, a resumed run
drops what came after its checkpoint (that training is repeated), and a line counts when it is whole. The header is of
the run as it was resumed last; `earlier` has the headers before, each with the step `until` which it held.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.distributed.disk import write_whole, writing
from align.errors import DataError
from align.evaluation.records import set_aside
from align.evaluation.thin import ThinCurve

FORMAT = "align.metrics/1"
FILE_NAME = "metrics.jsonl"


@dataclass
class Metrics:
    """What a run has logged: the header, and one dict per log, in order."""

    header: dict[str, Any]
    logs: list[dict[str, float | None]]


class MetricsWriter:
    """Appends to `<folder>/metrics.jsonl`; make one in the main process only. resume_step: as of `EvalWriter`."""

    def __init__(self, folder: str | Path, header: dict[str, Any], resume_step: int | None):
        self.path = Path(folder) / FILE_NAME
        self.path.parent.mkdir(parents=True, exist_ok=True)
        header = {"format": FORMAT, **header}
        logs: list[dict[str, float | None]] = []
        if self.path.exists():
            if resume_step is None:
                set_aside(self.path)
            else:
                header, logs = self._resumed(header, resume_step)
        write_whole(self.path, [json.dumps(_named(header), allow_nan=False) + "\n", *map(_line, logs)])

    def _resumed(self, header: dict[str, Any], resume_step: int) -> tuple[dict[str, Any], list]:
        """The new header with those before it, and the logs that stay."""
        try:
            before = read_metrics(self.path)
        except DataError as error:  # a log must not keep a run from being resumed
            set_aside(self.path, f"cannot be gone on with, the logs start anew ({error})")
            return header, []
        earlier = before.header.pop("earlier", [])
        header = {**header, "earlier": [*earlier, {**before.header, "until": resume_step}]}
        return header, [log for log in before.logs if _step(log) <= resume_step]

    def write(self, log: dict[str, float]) -> None:
        with writing(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(_line(log))


class MetricsFollower:
    """What a run has logged so far, thinned; each `update` reads only what was appended since the one before.

    header: None while there is no file. curves by metric, in the order in which they were first logged. phases: seconds
    of the main process by phase. last: the newest log. changes: grows whenever something is new.
    """

    def __init__(self, folder: str | Path):
        self.path = Path(folder) / FILE_NAME
        self.changes = 0
        self._start()

    def _start(self) -> None:
        self.header: dict[str, Any] | None = None
        self.curves: dict[str, ThinCurve] = {}
        self.phases: dict[str, float] = {}
        self.last: dict[str, float | None] | None = None
        self._first, self._inode, self._offset, self._number = b"", -1, 0, 0
        self.changes += 1

    def update(self) -> None:
        """Read on; from the start where the file was replaced. Raises DataError naming file and line, each time until
        it is mended; OSError for a file that cannot be read."""
        try:
            file = open(self.path, "rb")
        except FileNotFoundError:
            if self.header is not None:
                self._start()
            return
        with file:
            now = os.fstat(file.fileno())
            if now.st_ino != self._inode or now.st_size < self._offset or file.read(len(self._first)) != self._first:
                self._start()
                self._inode = now.st_ino
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                value = _parsed(line, self._number + 1, self.path)
                self._number += 1
                self._offset += len(line)
                self.changes += 1
                if self.header is None:
                    self.header, self._first = value, line
                else:
                    self._add(value)

    def _add(self, log: dict[str, float | None]) -> None:
        self.last = log
        for name, value in log.items():
            if name not in ("step", "at"):
                self.curves.setdefault(name, ThinCurve()).add(_step(log), value)
            if name.startswith("time/") and value is not None and math.isfinite(value):
                self.phases[name[5:]] = self.phases.get(name[5:], 0.0) + value


def read_metrics(path: str | Path) -> Metrics:
    """Read what a run has logged (the file, or the run's folder); an unfinished last line is left out.

    Raises DataError naming the file and line.
    """
    path = Path(path)
    if path.is_dir():
        path = path / FILE_NAME
    if not path.exists():
        raise DataError(f"{path} does not exist: a run writes it while it trains")
    lines = [_parsed(line, number, path) for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1)]
    if not lines:
        raise DataError(f"{path}: line 1 is not the header of a run's logs (format {FORMAT!r})")
    return Metrics(lines[0], lines[1:])


def _parsed(line: bytes, number: int, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise DataError(f"{path}: line {number} is not valid JSON ({error})") from error
    if number == 1:
        if (
            not isinstance(value, dict)
            or value.get("format") != FORMAT
            or not isinstance(value.get("settings", {}), dict)
        ):
            raise DataError(f"{path}: line 1 is not the header of a run's logs (format {FORMAT!r})")
    elif (
        not isinstance(value, dict)
        or value.get("step") is None
        or not all(item is None or isinstance(item, int | float) for item in value.values())
    ):
        raise DataError(f"{path}: line {number} is not a log of a run, which has a step, and numbers by name")
    return value


def _step(log: dict[str, float | None]) -> float:
    step = log["step"]
    assert step is not None  # `_parsed` has looked
    return step


def _line(log: Mapping[str, float | None]) -> str:
    finite = {key: value if value is not None and math.isfinite(value) else None for key, value in log.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def _named(value: Any) -> Any:
    """Settings as JSON can hold them: infinity (no limit) as the text "inf"."""
    if isinstance(value, dict):
        return {key: _named(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_named(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
