"""The points of a front, as a folder of trained policies lists them: `front.json`."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from align.distributed.disk import write_whole
from align.errors import DataError

FILE_NAME = "front.json"


@dataclass
class Point:
    """One policy of a front. folder: where it is saved, relative to the file's. kind: trained, soup (made of its
    neighbours), or margin (the policy that a margin reward is made of, where it was). seconds: that its training took,
    loading included."""

    name: str
    folder: str
    weights: dict[str, float]
    kind: str = "trained"
    seconds: float = 0.0


@dataclass
class Front:
    """Policies that one method made for several weight vectors. reference: that of their KL, which is the policy that
    training started from unless another was named.
    seconds: what else the front took, by phase (the margin rewards, say)."""

    method: str
    reference: str
    objectives: list[str]
    points: list[Point]
    seconds: dict[str, float] = field(default_factory=dict)


def write_front(front: Front, folder: str | Path) -> Path:
    path = Path(folder) / FILE_NAME
    write_whole(path, [json.dumps(asdict(front), indent=2) + "\n"])
    return path


def read_front(path: str | Path) -> Front:
    """The front in a folder, or in its `front.json`; the points' folders come back as whole paths."""
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    if not path.exists():
        raise DataError(f"{path.parent} holds no {FILE_NAME}: name the output folder of a sweep")
    try:
        content = json.loads(path.read_text())
        points = [Point(**{**point, "folder": str(path.parent / point["folder"])}) for point in content.pop("points")]
        front = Front(points=points, **content)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is no list of a front's points: {error}") from error
    if not points:
        raise DataError(f"{path} has no point yet: let the sweep train one")
    return front
