"""The figures and the directions that the house keeps (docs/architecture.md)."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from align.methods import METHODS

ROOT = Path(__file__).parents[1]
FOLDERS = ("align", "trainers", "reward_models", "tests", "benchmarks", "examples")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts)
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "align").glob("**/*.py")
} | {
    ".".join(("align", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for folder in ("trainers", "reward_models")
    for path in (ROOT / folder).glob("**/*.py")
}
# What each part may import, when it is imported or later. What is below a part knows nothing of it.
CORE = {"align.errors", "align.lazy", "align.data", "align.distributed", "align.modeling", "align.objectives"}
CORE |= {"align.rollout", "align.config", "align.overrides"}
LAYERS = {
    # align.config: its sections are used by the parts that they describe, its resolver stands above these
    **{part: CORE for part in CORE - {"align.config"}},
    "align.reward_models": CORE,
    "align.evaluation": CORE | {"align.reward_models"},
    "align.trainers": CORE | {"align.reward_models", "align.evaluation"},
    "align.quickstart": CORE | {"align.reward_models", "align.evaluation", "align.trainers"},
}


def part_of(module: str) -> str:
    return ".".join(module.split(".")[:2])


def imports(path: Path, *, all_levels: bool) -> set[str]:
    """The modules of the package that a file imports: at its top, or anywhere but for type checkers."""
    pending, found = list(ast.parse(path.read_text()).body), set()
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & MODULES.keys()) or {node.module}
        elif all_levels or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            pending += list(ast.iter_child_nodes(node))
    return found & MODULES.keys()


def test_no_circle_of_imports():
    try:
        TopologicalSorter({name: imports(path, all_levels=False) for name, path in MODULES.items()}).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("part", sorted(LAYERS))
def test_imports_point_one_way(part):
    for name, path in MODULES.items():
        if part_of(name) == part:
            wrong = {m for m in imports(path, all_levels=True) if part_of(m) not in LAYERS[part] | {part, "align"}}
            assert not wrong, f"{name} imports {sorted(wrong)}"


def test_methods_alone_stand_directly_in_trainers():
    assert {path.stem for path in (ROOT / "trainers").glob("*.py")} == {"__init__", *METHODS}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sizes(path):
    """A file has at most 400 lines, a function 60, a class three bases."""
    text = path.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name}, line {node.lineno}"
        if isinstance(node, ast.ClassDef):
            assert len(node.bases) <= 3, f"{node.name}, line {node.lineno}"


def test_every_benchmark_and_result_is_in_the_index():
    folder = ROOT / "benchmarks"
    index = (folder / "README.md").read_text()
    commands = {str(path.relative_to(folder)) for path in [*folder.glob("*.py"), *folder.glob("gpu/*.py")]}
    results = {path.name for path in (folder / "results").glob("*.json")}
    assert not [name for name in commands | results if f"`{name}`" not in index]
