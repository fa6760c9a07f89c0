"""The report in headless Chromium: no error, curves that can be hidden and rescaled, tables that sort."""

from pathlib import Path

import pytest

from align.cli.main import main
from tests.browser import ask, needs_chromium

EXAMPLES = Path(__file__).parents[2] / "examples" / "evaluations"

LOOK = """
const curves = document.querySelector("#curves-runs"), paths = () => curves.querySelectorAll("path").length;
const found = {before: paths(), figures: document.querySelectorAll("figure > svg").length};
curves.querySelector("button").click();
found.hidden = paths();
const choice = curves.querySelector("select[aria-label='scale of x']");
choice.value = "log"; choice.dispatchEvent(new Event("change"));
found.first = curves.querySelectorAll("circle").length;
const svg = curves.querySelector("svg"), box = svg.getBoundingClientRect();
svg.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + box.width / 2, clientY: box.top + 50}));
found.hover = curves.querySelector(".hover").textContent;
const table = document.createElement("table");
table.innerHTML = "<thead><tr><th>name</th><th>score</th></tr></thead><tbody><tr><td>a</td><td>1,200</td></tr>" +
  "<tr><td>b</td><td>–</td></tr><tr><td>c</td><td>−3.5</td></tr><tr><td>d</td><td>20 %</td></tr></tbody>";
document.body.append(table); makeSortable(table);
const order = () => Array.from(table.tBodies[0].rows).map(row => row.cells[0].textContent).join("");
table.tHead.rows[0].cells[1].click(); found.up = order();
table.tHead.rows[0].cells[1].click(); found.down = order();
found.wide = document.documentElement.scrollWidth > window.innerWidth;
return found;
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    runs = [str(EXAMPLES / name) for name in ("single", "ensemble")]
    assert (
        main(["overoptimization", *runs, "--output_dir", str(folder), "--names", "a<img src=x onerror=x()>", "b"]) == 0
    )
    return folder / "report.html"


@needs_chromium
def test_the_report(report, tmp_path):
    found, console = ask(report, LOOK, tmp_path)
    assert console == []
    assert found["before"] == 4 and found["hidden"] == 3 and found["figures"] == 4
    assert found["first"] == 3 * 15  # a log axis has no place for KL 0
    assert found["hover"].startswith(("a<img src=x onerror=x()>: ", "b: ")) and "KL (nats)" in found["hover"]
    assert (found["up"], found["down"]) == ("cdab", "adcb") and not found["wide"]
