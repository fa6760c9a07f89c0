"""The quickstart's folder: what each finished phase left, so that a second start continues after it."""

import json
from pathlib import Path

from align.distributed.checkpoints import flush_tree
from align.distributed.disk import write_whole
from align.errors import ConfigError


class Workspace:
    """`<folder>/phases.json` holds the results and seconds of the finished phases; their files lie beside it."""

    def __init__(self, folder: str | Path, fingerprint: dict):
        fingerprint = json.loads(json.dumps(fingerprint))  # as it is read back: tuples are lists
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.state_path = self.folder / "phases.json"
        if self.state_path.exists():
            self.state = json.loads(self.state_path.read_text())
            if self.state["settings"] != fingerprint:
                raise ConfigError(
                    f"{self.folder} holds a quickstart with other settings: choose another --output_dir, or delete it"
                )
        else:
            self.state = {"settings": fingerprint, "phases": {}}
            self._save()

    def path(self, *parts: str) -> Path:
        path = self.folder.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def finished(self, phase: str) -> bool:
        return phase in self.state["phases"]

    def record(self, phase: str, result: dict, seconds: float) -> None:
        """The phase is finished; `result` holds JSON values. Its files get to the disk before the note that says so."""
        flush_tree(self.folder)
        self.state["phases"][phase] = {"seconds": seconds, "result": result}
        self._save()

    @property
    def seconds(self) -> dict[str, float]:
        return {name: phase["seconds"] for name, phase in self.state["phases"].items()}

    def _save(self) -> None:
        write_whole(self.state_path, [json.dumps(self.state, indent=1, allow_nan=False)], "start the quickstart again")
