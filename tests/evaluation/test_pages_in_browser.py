"""Every page in one headless Chromium, at the width of a desk and of a phone: no error, figures whose values are shown
under the pointer, curves to hide and rescale, tables that sort, nothing wider than the screen."""

import pytest

from tests.browser import ask_all, needs_chromium
from tests.evaluation.pages import NAMES, write_pages

DESK, PHONE = 1100, 390
LOOK = """
const all = Array.from(document.querySelectorAll(".curves"));
const found = {figures: all.length, empty: [], hover: [], sorted: 0};
const marks = figure => figure.querySelectorAll("path, circle").length;
for (const figure of all) {
  const svg = figure.querySelector("svg");
  if (!svg || !marks(figure)) { found.empty.push(figure.id); continue; }
  const box = svg.getBoundingClientRect();
  const point = {clientX: box.left + box.width / 2, clientY: box.top + box.height / 2};
  svg.dispatchEvent(new PointerEvent("pointermove", point));
  found.hover.push(figure.querySelector(".hover").textContent);
  const cut = text => {
    const t = text.getBoundingClientRect();
    return t.left < box.left - 2 || t.right > box.right + 14;
  };
  if (box.right > window.innerWidth || Array.from(svg.querySelectorAll("text")).some(cut))
    found.empty.push("cut: " + figure.id);
}
const first = all[0];
if (first) {
  found.before = marks(first); first.querySelector("button").click(); found.hidden = marks(first);
  first.querySelectorAll("button[aria-pressed=true]").forEach((_, k) =>
    first.querySelectorAll("button[aria-pressed=true]")[0].click());  // each click draws new buttons
  found.none = first.querySelector("svg").textContent;
  first.querySelectorAll("button").forEach((_, k) => first.querySelectorAll("button")[k].click());
  const choice = first.querySelector("select[aria-label='scale of x']");
  if (choice) { choice.value = "log"; choice.dispatchEvent(new Event("change")); found.log = marks(first); }
}
for (const table of document.querySelectorAll("table")) {
  const cell = table.querySelector("th.sortable");
  if (!cell || table.closest("details:not([open])")) continue;
  cell.click(); const up = Array.from(table.tBodies[0].rows).map(row => sortKey(row, 0));
  cell.click(); const down = Array.from(table.tBodies[0].rows).map(row => sortKey(row, 0));
  const numbers = up.every(key => typeof key === "number"), order = (a, b) => a < b ? -1 : a > b ? 1 : 0;
  const expected = numbers || up.every(key => typeof key === "string") ? [...up].sort(order) : up;
  if (String(expected) === String(up) && up.length === down.length) found.sorted++;
  else found.unsorted = String(up);
}
found.wide = document.documentElement.scrollWidth > window.innerWidth + 1;
const hinted = part => part.classList.contains("wide") === (part.scrollWidth > part.clientWidth + 1);
found.hint = Array.from(document.querySelectorAll(".scroll")).every(hinted);
return found;
"""
SORT = """
const table = document.createElement("table");
table.innerHTML = "<thead><tr><th>name</th><th>score</th></tr></thead><tbody><tr><td>a</td><td>1,200</td></tr>" +
  "<tr><td>b</td><td>–</td></tr><tr><td>c</td><td>−3.5</td></tr><tr><td>d</td><td>20 %</td></tr></tbody>";
document.body.append(table); makeSortable(table);
const order = () => Array.from(table.tBodies[0].rows).map(row => row.cells[0].textContent).join("");
table.tHead.rows[0].cells[1].click(); const up = order();
table.tHead.rows[0].cells[1].click();
return [up, order()];
"""
MEMBERS = """
const figure = document.createElement("div"), members = [0, 1, 2, 3, 4, 5, 6];
document.body.append(figure);
const y = k => [0.6 * ((k + 0.5) / 7 - 0.5)];
const one = k => ({name: "member " + k, line: false, x: [0.5], xlow: [0.4], xhigh: [0.6], y: y(k)});
drawCurves(figure, {x: "accuracy", y: "", y_names: ["all pairs"], curves: members.map(one)});
const heights = Array.from(figure.querySelectorAll("circle")).map(circle => +circle.getAttribute("cy"));
figure.remove();
return heights.slice(1).map((y, k) => y - heights[k]);
"""
FIGURES = {"overopt": 8, "bon": 7, "reward_eval": 7, "reward_bon": 1, "compare": 0, "data": 0, "masks": 0,
           "runs": 7, "watch": 7, "front": 2}  # fmt: skip


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What there is of every page by (name, width), and the console's messages."""
    folder = tmp_path_factory.mktemp("pages")
    pages = [(page, width) for page in write_pages(folder) for width in (DESK, PHONE)]
    look = f"const look = () => {{{LOOK}}}, sort = () => {{{SORT}}}, rows = () => {{{MEMBERS}}}; const seen = look(); "
    look += "if (typeof makeSortable === 'function') { seen.order = sort(); seen.apart = rows(); } return seen;"
    found, console = ask_all(folder, pages, look, folder / "profile")
    return {(key.split(".")[0], int(key.split("@")[1])): value for key, value in found.items()}, console


@needs_chromium
def test_nothing_is_printed_to_the_console(seen):
    found, console = seen
    assert console == [] and set(found) == {(name, width) for name in NAMES for width in (DESK, PHONE)}
    assert not [(key, value) for key, value in found.items() if isinstance(value, str)]  # a script that failed


@needs_chromium
@pytest.mark.parametrize("width", [DESK, PHONE])
@pytest.mark.parametrize("name", NAMES)
def test_a_page(seen, name, width):
    found = seen[0][name, width]
    assert found["figures"] == FIGURES[name] and not found["empty"] and not found["wide"] and found["hint"]
    assert len(found["hover"]) == FIGURES[name] and all(": " in text for text in found["hover"])
    assert "unsorted" not in found and found.get("order", ["cdab", "adcb"]) == ["cdab", "adcb"]
    if FIGURES[name]:
        assert found["hidden"] < found["before"] and "all curves are hidden" in found["none"]
    if name in ("overopt", "bon", "reward_bon"):
        assert found["log"] < found["before"]  # KL 0 has no place there
    if name in ("overopt", "compare", "data", "front", "reward_eval"):
        assert found["sorted"] >= 1


@needs_chromium
def test_estimates_of_many_members_do_not_cover_each_other(seen):
    for width in (DESK, PHONE):
        gaps = seen[0]["reward_eval", width]["apart"]
        assert len(gaps) == 6 and min(gaps) >= 8  # a dot is 8 wide


@needs_chromium
def test_the_names_of_runs_stay_text(seen):
    hover = seen[0]["overopt", DESK]["hover"]
    assert hover[0].startswith(("gold (step", "proxy (step")) and "KL (nats)" in hover[0]
    assert hover[2].startswith(("a<img src=x onerror=x()> (step", "b (step")) and " to " in hover[2]
