"""The documentation as a whole: links and anchors, the index, the API reference, the table of papers.

`make docs` builds the site, where the same links are errors again; it takes too long for every change.
"""

import ast
import importlib
import pkgutil
import re
from functools import cache
from pathlib import Path

import yaml

import align
from align.lazy import load
from align.methods import METHODS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "benchmarks/README.md",
    *(str(p.relative_to(ROOT)) for p in DOCS.rglob("*.md")),
]


@cache
def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub and MyST make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    found: list[str] = []
    for heading in re.findall(r"^#{1,6} (.*)$", text, flags=re.M):
        slug = re.sub(r"[^\w\- ]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading).lower()).replace(" ", "-")
        found.append(slug + (f"-{found.count(slug)}" if slug in found else ""))
    return set(found)


def test_links_and_anchors_lead_somewhere():
    broken = []
    for page in PAGES:
        here = ROOT / page
        text = re.sub(r"^```.*?^```", "", here.read_text(), flags=re.S | re.M)
        for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", text):
            if target.startswith("https://"):
                continue
            file = here if not target else here.parent / target
            if not file.exists() or (anchor and anchor not in anchors(file)):
                broken.append(f"{page}: {target}#{anchor}")
    assert not broken


def test_the_index_has_every_page():
    linked = {*re.findall(r"\]\(([\w/]+\.md)\)", (DOCS / "index.md").read_text()), "index.md"}
    linked |= {
        f"api/{page}" for page in re.findall(r"^- .*?\]\((\w+\.md)\)", (DOCS / "api/index.md").read_text(), flags=re.M)
    }
    assert {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")} == linked
    assert {f"methods/{name}.md" for name in METHODS} <= linked


def test_the_reference_has_every_public_name():
    pages = {page.name: page.read_text() for page in (DOCS / "api").glob("*.md")}
    documented = re.findall(r"^\.\. auto\w+:: (\S+)", "".join(pages.values()), flags=re.M)
    of_methods = {place.rpartition(":")[2] for method in METHODS.values() for place in (method.trainer, method.config)}
    named = set(re.findall(r"`(\w+)`", pages["index.md"]))
    assert of_methods <= named
    assert (
        set(align.__all__) - {"AlignError"}
        == {n.removeprefix("align.") for n in documented if n.count(".") == 1} - {"errors"} | of_methods
    )
    assert "align.errors" in documented and len(documented) == len(set(documented))
    modules = {f"align.objectives.{p.stem}" for p in (ROOT / "align/objectives").glob("*.py") if _has_public(p)}
    unnamed = {"align.objectives.preference", "align.objectives.preference_objective", "align.objectives.pair_losses"}
    assert modules - unnamed == {name for name in documented if name.startswith("align.objectives.")} - {
        "align.objectives.preference_objective.preference_objective"
    }
    for name in documented:
        pkgutil.resolve_name(name)


def _has_public(path: Path) -> bool:
    kinds = (ast.FunctionDef, ast.ClassDef)
    return any(isinstance(n, kinds) and n.name[0] != "_" for n in ast.parse(path.read_text()).body)


def test_the_papers_are_in_the_code(tmp_path):
    """Every option with its value is taken by the method's configuration, which refuses what it would ignore."""
    rows = [
        line.split(" | ")
        for line in (DOCS / "papers.md").read_text().splitlines()
        if line.startswith("| ") and "http" in line
    ]
    assert len(rows) >= 45
    for paper, number, in_a_run, code, _ in rows:
        assert (found := re.fullmatch(r"\[(\d{4}\.\d{5})\]\(https://arxiv.org/abs/(\d{4}\.\d{5})\)", number)), paper
        assert found[1] == found[2], paper
        module, _, name = code.strip("`").partition(":")
        assert load(f"align.{module}:{name}") if name else importlib.import_module(f"align.{module}"), paper
        names = re.findall(r"`(\w+)`", in_a_run)
        assert set(names) <= set(align.__all__) and (names or in_a_run.startswith(("`align ", "in no trainer"))), paper
        options = dict(re.findall(r"`(\w+): ([^`]*)`", in_a_run))
        if options:
            (method,) = [m for m in METHODS.values() if m.trainer.rpartition(":")[2] in names]
            quiet = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True}
            load(method.config)(**quiet, **{name: yaml.safe_load(value) for name, value in options.items()})


def test_the_papers_of_the_objectives_are_in_the_table():
    """Every arXiv number in a docstring of align/objectives."""
    cited = {
        n
        for path in (ROOT / "align/objectives").glob("*.py")
        for n in re.findall(r"arXiv\s+(\d{4}\.\d{5})", path.read_text())
    }
    missing = cited - set(re.findall(r"abs/(\d{4}\.\d{5})", (DOCS / "papers.md").read_text()))
    assert not missing
