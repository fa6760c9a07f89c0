"""`import align`: quick and lazy."""

import ast
import importlib
import importlib.util
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import align
from align.lazy import load

ROOT = Path(__file__).resolve().parents[2]


def best_seconds(*command: str, tries: int = 3) -> float:
    """CPU seconds (user and system) of the quickest of some runs: what the command costs, whatever else is running."""
    best = float("inf")
    for _ in range(tries):
        before = os.times()
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        after = os.times()
        spent = after.children_user + after.children_system - before.children_user - before.children_system
        best = min(best, spent)
    return best


def test_import_takes_less_than_a_fifth_of_a_second():
    assert best_seconds(sys.executable, "-c", "import align") < 0.2


def test_help_takes_less_than_half_a_second():
    assert best_seconds(sys.executable, "-m", "align", "--help") < 0.5


def test_import_loads_nothing_heavy_and_sets_only_what_it_says():
    code = (
        "import os, sys; before = dict(os.environ); import align; "
        "heavy = {'torch', 'transformers', 'numpy', 'yaml', 'trl', 'datasets'} & set(sys.modules); "
        "print(sorted(heavy), sorted(set(os.environ.items()) - set(before.items())))"
    )
    names = ("HF_HUB_DISABLE_TELEMETRY", "VLLM_NO_USAGE_STATS", "DO_NOT_TRACK", "WANDB_ERROR_REPORTING")
    env = {key: value for key, value in os.environ.items() if key not in names}
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    expected = sorted((name, "false" if name == "WANDB_ERROR_REPORTING" else "1") for name in names)
    assert out.stdout.strip() == f"[] {expected}"

    env["DO_NOT_TRACK"] = "0"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert "DO_NOT_TRACK" not in out.stdout


@pytest.mark.parametrize("name", align.__all__)
def test_every_public_name_loads(name):
    assert getattr(align, name).__name__ == name
    assert name in dir(align)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'SFTrainer'"):
        align.SFTrainer  # noqa: B018


def test_load_by_name():
    assert load("align.rollout.types:SamplingParams").__name__ == "SamplingParams"


@pytest.mark.parametrize("package", ["align", "align.data"])
def test_what_editors_see_is_what_is_served(package):
    module = importlib.import_module(package)
    (block,) = [
        node
        for node in ast.parse(Path(module.__file__).read_text()).body
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    ]
    seen = {
        alias.asname: f"{node.module}:{alias.name}"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    served = {name: path if ":" in path else f"{package}.{path}:{name}" for name, path in module._EXPORTS.items()}
    assert seen == served


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_everything_that_the_documents_import_exists(page):
    """Blocks that are shown and not run count too; they may be indented, as in a list."""
    for block in re.findall(r"^[ ]*```python\n(.*?)^[ ]*```", page.read_text(), flags=re.S | re.M):
        for node in ast.walk(ast.parse(textwrap.dedent(block))):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "align":
                for alias in node.names:
                    module = importlib.import_module(node.module)
                    found = hasattr(module, alias.name) or importlib.util.find_spec(f"{node.module}.{alias.name}")
                    assert found, f"{page.name}: from {node.module} import {alias.name}"
