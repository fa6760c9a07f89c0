"""requirements/lowest.txt and highest.txt pin every dependency: the first at the lower end of the range that
pyproject.toml gives it, the second inside."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RANGES = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["qlora"]]
DEPENDENCIES = {r.name: r.specifier for r in map(Requirement, RANGES)}


def pins(name: str) -> dict[str, Version]:
    lines = (ROOT / "requirements" / f"{name}.txt").read_text().splitlines()
    pinned = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {r.name: Version(next(iter(r.specifier)).version) for r in pinned}


@pytest.mark.parametrize("name", ["lowest", "highest"])
def test_every_dependency_is_pinned_inside_its_range(name):
    found = pins(name)
    assert found.keys() == DEPENDENCIES.keys()
    assert not [n for n, version in found.items() if not DEPENDENCIES[n].contains(version)]


def test_the_lowest_versions_are_the_lower_ends_of_the_ranges():
    lower = {n: Version(s.version) for n, specifiers in DEPENDENCIES.items() for s in specifiers if s.operator == ">="}
    assert {n: v for n, v in pins("lowest").items() if n != "torch"} == {n: v for n, v in lower.items() if n != "torch"}
