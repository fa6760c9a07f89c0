"""docs/guarantees.md names tests that there are, one at least for every promise."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_promise_has_its_test():
    rows = [line for line in (ROOT / "docs" / "guarantees.md").read_text().splitlines() if line.startswith("| ")]
    promises = [row for row in rows if row != "| promise | held by |"]
    assert len(promises) >= 30
    for row in promises:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row.split(" | ")[1])
        assert named and row.count("tests/") == len(named), row
        for file, name in named:
            tree = ast.parse((ROOT / file).read_text())
            assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}::{name}"
