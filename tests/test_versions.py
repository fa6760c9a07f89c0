"""requirements/highest.txt pins every dependency, inside the range that pyproject.toml gives it."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RANGES = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["qlora"]]
DEPENDENCIES = {r.name: r.specifier for r in map(Requirement, RANGES)}


def test_every_dependency_is_pinned_inside_its_range():
    lines = (ROOT / "requirements" / "highest.txt").read_text().splitlines()
    pinned = [Requirement(line) for line in lines if line and not line.startswith("#")]
    found = {r.name: Version(next(iter(r.specifier)).version) for r in pinned}
    assert found.keys() == DEPENDENCIES.keys()
    assert not [n for n, version in found.items() if not DEPENDENCIES[n].contains(version)]
