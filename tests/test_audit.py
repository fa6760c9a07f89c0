"""`make audit`: packages that could not be looked up are never called free of vulnerabilities."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / ".ci" / "audit.py"
FINE = {"name": "a", "version": "1", "vulns": []}
BAD = {
    "name": "b",
    "version": "2",
    "vulns": [{"id": "CVE-1", "fix_versions": ["3"]}, {"id": "X-2", "fix_versions": []}],
}
SKIPPED = {"name": "c", "skip_reason": "Dependency not found on PyPI"}


@pytest.mark.parametrize(
    "dependencies, status, says",
    [
        ([FINE], 0, "1 of 1 packages looked up, 0 with"),
        ([FINE, BAD], 1, "b 2: CVE-1, fixed in 3\nb 2: X-2, fixed in no version\n2 of 2 packages looked up, 1 with"),
        ([FINE, SKIPPED], 3, "1 of 2 packages looked up, 0 with known vulnerabilities\nNOT AUDITED: c: Dependency not"),
        ([SKIPPED, BAD], 1, "NOT AUDITED: c"),
        ([], 3, "NOT AUDITED: anything"),
    ],
)
def test_the_verdict(dependencies, status, says):
    found, text = runpy.run_path(str(SCRIPT))["verdict"](dependencies)
    assert found == status and says in text


def test_an_audit_that_does_not_run_is_no_pass(tmp_path):
    (tmp_path / "pip_audit.py").write_text("raise ConnectionError('no route')")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "x.txt"], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 3
    assert done.stdout == "NOT AUDITED: pip-audit ended with 1: ConnectionError: no route\n"
