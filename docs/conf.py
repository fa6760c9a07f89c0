"""The documentation as a site: `make docs` writes build/site, and a link or an anchor that leads nowhere is an error.

The pages are plain Markdown that reads as well in the repository. What the site adds: the menu, from the lists of
index.md; to the page of each method its options, from align/config/options.json, and its classes; the API reference,
from the docstrings.
"""

import inspect
import json
import re
from functools import partial
from pathlib import Path

from pygments.lexers.data import JsonLexer
from pygments.lexers.special import TextLexer

import align
from align.methods import METHODS

ROOT = Path(__file__).parents[1]
OPTIONS = json.loads((ROOT / "align/config/options.json").read_text())

project = "align"
author = "the authors of align"
version = release = align.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
html_theme = "furo"
html_title = f"align {version}"
html_show_copyright = html_show_sourcelink = False
html_static_path: list[str] = []
myst_heading_anchors = 3
default_role = "code"  # docstrings write code in single quotes, as Markdown does
autodoc_class_signature = "separated"
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say it, with shapes and units
autodoc_preserve_defaults = True
nitpicky = False


def menu(text: str) -> str:
    """An index with a hidden table of contents for each of its headings"""
    parts = [text]
    for heading, body in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", text, flags=re.S | re.M):
        pages = re.findall(r"\]\(([\w/]+)\.md\)", body)
        parts.append(hidden_toctree(pages, heading))
    return "\n".join(parts)


def hidden_toctree(pages: list[str], caption: str | None = None) -> str:
    head = ["", "```{toctree}", ":hidden:", *([f":caption: {caption}"] if caption else []), ""]
    return "\n".join([*head, *pages, "```", ""])


def method_sections(name: str) -> str:
    """The method's own options, and its classes."""
    method = METHODS[name]
    lines = ["", "## Options", "", f"Of the method itself; `align {name} --help all` lists the others too.", ""]
    lines += ["| option | default | meaning |", "|---|---|---|"]
    for option, number in OPTIONS["methods"][name].items():
        entry = OPTIONS["options"][number]
        if entry["group"] == "method":
            default = f"`{json.dumps(entry['default'])}`" if entry.get("default") is not None else ""
            lines.append(f"| `{option}` | {default} | {in_a_cell(entry['help'])} |")
    trainer, config = (place.replace(":", ".") for place in (method.trainer, method.config))
    members = "train, evaluate, save_model" + (", close" if method.data == "prompts" else "")
    lines += ["", "## Classes", "", "```{eval-rst}", f".. autoclass:: {trainer}", f"   :members: {members}"]
    return "\n".join([*lines, "   :inherited-members:", "", f".. autoclass:: {config}", "   :no-index:", "```", ""])


def in_a_cell(text: str) -> str:
    return re.sub(r"([|<>*_\[\]$])", r"\\\1", " ".join(text.split()))


def add_to_page(app, name: str, source: list[str]) -> None:
    if name == "index":
        source[0] = menu(source[0])
    elif name == "api/index":
        source[0] += hidden_toctree(re.findall(r"^- .*?\]\((\w+)\.md\)", source[0], flags=re.M))
    elif name.startswith("methods/"):
        source[0] += method_sections(name.removeprefix("methods/"))
    source[0] = re.sub(r"\[([^\]]*)\]\((\.\./[^)#]*)(#[^)]*)?\)", partial(out_of_the_site, name), source[0])


def out_of_the_site(page: str, link: re.Match) -> str:
    """Files of the repository can be downloaded from the site; its folders, and its other pages, are named only."""
    target = (ROOT / "docs" / page).parent / link[2]
    inside = target.resolve().is_relative_to(ROOT / "docs")
    return link[0] if inside or (target.is_file() and target.suffix != ".md") else link[1]


def from_markdown(app, what, name, thing, options, lines: list[str]) -> None:
    """Docstrings are plain text with code in backquotes, and lines `name: what it is`: nothing else is markup."""
    text = inspect.cleandoc("\n".join(lines))
    text = "\n\n".join(as_list(paragraph) for paragraph in text.split("\n\n"))
    parts = re.split(r"(``.*?``|`[^`]*`)", text, flags=re.S)
    parts[::2] = [re.sub(r"([*|\\]|_(?=\W|$))", r"\\\1", part) for part in parts[::2]]
    lines[:] = [*"".join(parts).splitlines(), ""]


ENTRY = re.compile(r"([a-z_]\w*(?:, [a-z_]\w*)*): (?=\S)")


def as_list(paragraph: str) -> str:
    """A list of a paragraph of `name: what it is`; as it stands if it is laid out in another way."""
    lines = paragraph.split("\n")
    if not ENTRY.match(lines[0]):
        return paragraph
    if not all(ENTRY.match(line) or line.startswith("    ") for line in lines):
        return "::\n\n" + "\n".join(f"    {line}" for line in lines)
    return "\n".join(
        ENTRY.sub(r"- ``\1``: ", line, count=1) if ENTRY.match(line) else "  " + line.strip() for line in lines
    )


def without_init(app, what, name, thing, options, signature, returns):
    """A configuration's hundreds of fields are the options of its method's page."""
    return ("(...)", None) if what == "class" and hasattr(thing, "__dataclass_fields__") else None


def setup(app) -> dict:
    app.add_lexer("jsonl", JsonLexer)
    app.add_lexer("mermaid", TextLexer)
    app.connect("source-read", add_to_page)
    app.connect("autodoc-process-docstring", from_markdown, priority=400)  # before napoleon reads "Args:"
    app.connect("autodoc-process-signature", without_init)
    return {"parallel_read_safe": True}
