"""What a policy that is trained on demonstrations or pairs answers at evaluations, `<run>/completions.jsonl`.

The first line is a header, every further line one evaluation:

    {"format": "align.completions/1"}
    {"step": 20, "samples": [{"prompt": "...", "completion": "...", "ended": true}]}

As with the evaluation file of on-policy runs (`align.evaluation.records`), a resumed run drops what came after its
checkpoint, and a line counts when it is whole.
"""

import json
from pathlib import Path
from typing import Any

from align.distributed.disk import write_whole, writing
from align.errors import DataError
from align.evaluation.records import set_aside

FORMAT = "align.completions/1"
FILE_NAME = "completions.jsonl"


class CompletionsWriter:
    """Appends to `<folder>/completions.jsonl`; main process only. resume_step: None starts a new file, as that of an
    earlier run has another name by then (`align.trainers.core.lock`). last_step: the newest evaluation in the file."""

    def __init__(self, folder: str | Path, resume_step: int | None):
        self.path = Path(folder) / FILE_NAME
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept: list[dict[str, Any]] = []
        if resume_step is not None and self.path.exists():
            kept = self._kept(resume_step)
        self.last_step: int | None = kept[-1]["step"] if kept else None
        write_whole(self.path, (json.dumps(line) + "\n" for line in ({"format": FORMAT}, *kept)))

    def _kept(self, resume_step: int) -> list[dict[str, Any]]:
        try:
            return [record for record in read_completions(self.path) if record["step"] <= resume_step]
        except DataError as error:  # a log must not keep a run from being resumed
            set_aside(self.path, f"cannot be gone on with, the answers start anew ({error})")
            return []

    def write(self, step: int, samples: list[dict[str, Any]]) -> None:
        with writing(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "samples": samples}) + "\n")
        self.last_step = step


def read_completions(path: str | Path) -> list[dict[str, Any]]:
    """The evaluations of a file, or of a run's folder, in order. Raises DataError naming the file and line."""
    path = Path(path)
    if path.is_dir():
        path = path / FILE_NAME
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            value = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}: line {number} is not valid JSON ({error})") from error
        if number == 1:
            if not isinstance(value, dict) or value.get("format") != FORMAT:
                raise DataError(f"{path}: line 1 is not the header of a file of completions (format {FORMAT!r})")
        elif (
            not isinstance(value, dict)
            or not isinstance(value.get("samples"), list)
            or not isinstance(value.get("step"), int)
        ):
            raise DataError(f"{path}: line {number} is not an evaluation, with a step and samples")
        else:
            found.append(value)
    return found
