"""The summary's keys and strictness, and that the report shows it, whole, offline."""

import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from align.errors import DataError
from align.evaluation import report
from align.evaluation.best_of_n import bon_curve
from align.evaluation.records import read_run
from align.evaluation.summary import build_summary, read_summary, validate_summary, write_summary
from tests.evaluation.pages import figures_of
from tests.evaluation.synthetic import scored_answers, write_run


@pytest.fixture(scope="module")
def summary(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    curves = {
        name: bon_curve(*scored_answers(60, 128, trap=trap), name=name)
        for name, trap in (("single <b>", 1.3), ("uwo", 0.05))
    }
    runs = {
        "single <b>": read_run(write_run(folder / "a", "single", beta=0.7, seed=1)),
        "uwo": read_run(write_run(folder / "b", "uwo", beta=0.2, max_kl=15, seed=2)),
        "blind": read_run(write_run(folder / "c", "blind", gold=False, seed=3)),
    }
    return build_summary(
        best_of_n=curves,
        runs=runs,
        phases={"sft": 12.34, "reward models": 100.0},
        setup={"policy": "tiny <i>", "seed": 5, "label noise": 0.25, "layers": {"heads": 2}},
        reward_models=[{"name": "rm0", "accuracy": 0.7123, "label_noise": 0.25}, {"name": "rm1", "accuracy": 0.69}],
    )


@pytest.fixture(scope="module")
def page(summary, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    paths = report.write_outputs(folder, summary, title="What & why", intro=["First.", "Second <script>."])
    assert [path.name for path in paths] == ["report.html", "summary.json"]
    return paths[0]


def test_keys_and_lengths(summary):
    assert set(summary) >= {"best_of_n", "runs", "fits", "phases"}
    for kind, axis in (("best_of_n", "n"), ("runs", "step")):
        for entry in summary[kind].values():
            lengths = {len(entry[key]) for key in (axis, "kl", "proxy", "gold", "proxy_low", "proxy_high")}
            assert len(lengths) == 1
    assert summary["phases"] == {"sft": 12.34, "reward models": 100.0}
    assert summary["runs"]["blind"]["gold"] == [None] * 21 and summary["runs"]["blind"]["peak"] is None
    assert set(summary["fits"]["runs"]) == {"single <b>", "uwo"}
    assert summary["versions"]["numpy"] == np.__version__


def test_only_runs_of_one_gold_reward_and_of_the_same_prompts_are_compared(tmp_path):
    runs = {name: read_run(write_run(tmp_path / name, name, steps=3)) for name in ("a", "judge", "elsewhere", "b")}
    runs["judge"].gold_name = "judge"
    for samples in runs["elsewhere"].samples:
        for sample in samples:
            sample["prompt"] = f"not {sample['prompt']}"
    summary = build_summary(runs=runs)
    found = summary["comparisons"]["runs"]
    assert found["base"] == "a" and list(found["end_gold_minus_base"]) == ["b"]
    shown = report.comparison(summary, "runs")
    assert "The gold score of judge is not compared with that of a: its gold reward is judge, and not gold." in shown
    assert any("elsewhere is not compared with that of a: it was evaluated on other prompts" in line for line in shown)


def test_numbers_are_those_of_the_curves(summary):
    entry = summary["runs"]["single <b>"]
    peak = int(np.argmax(entry["gold"]))
    assert entry["peak"]["peak"] == {
        "index": peak, "x": entry["kl"][peak], "step": entry["step"][peak], "kl": entry["kl"][peak],
        "proxy": pytest.approx(entry["proxy"][peak]), "gold": pytest.approx(entry["gold"][peak]),
    }  # fmt: skip
    assert all(
        low <= value <= high
        for low, value, high in zip(entry["gold_low"], entry["gold"], entry["gold_high"], strict=True)
    )
    assert entry["unit"]["gold_zero"] == entry["gold"][0]
    fit = summary["fits"]["runs"]["single <b>"]["rl"]
    unit = entry["unit"]["gold_sd"]  # the run was made with alpha 1.2 and beta 0.7 in raw units
    assert fit["alpha_low"] < 1.2 / unit < fit["alpha_high"] and fit["beta_low"] < 0.7 / unit < fit["beta_high"]
    assert fit["peak_status"] == "measured"
    end = {name: summary["runs"][name]["gold"][-1] for name in ("single <b>", "uwo")}
    comparison = summary["comparisons"]["runs"]
    assert comparison["base"] == "single <b>"
    assert comparison["end_gold_minus_base"]["uwo"]["value"] == pytest.approx(end["uwo"] - end["single <b>"])
    assert comparison["end_gold_minus_base"]["uwo"]["low"] > 0
    samples = entry["samples"]
    assert [s["prompt"] for s in samples["start"]] == [s["prompt"] for s in samples["end"]] == ["sea", "forest", "city"]
    assert samples["end"][0]["completion"].startswith("please please")


def test_verdicts(summary):
    assert summary["runs"]["single <b>"]["peak"]["verdict"] == "over-optimised"
    assert summary["best_of_n"]["single <b>"]["peak"]["verdict"] == "over-optimised"
    assert summary["best_of_n"]["uwo"]["peak"]["verdict"] == "not over-optimised"


def test_round_trip_is_strict_json(summary, tmp_path):
    path = write_summary(tmp_path, summary)
    assert read_summary(tmp_path) == summary == read_summary(path)
    assert not re.search(r"\b(NaN|Infinity)\b", path.read_text())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("fits"), "'fits' is missing"),
        (lambda s: s["runs"]["uwo"].pop("kl"), "runs.uwo lacks the lists kl"),
        (lambda s: s["best_of_n"]["uwo"]["gold"].append(1.0), "best_of_n.uwo differ in length"),
        (lambda s: s["runs"]["uwo"]["gold"].__setitem__(2, math.nan), r"runs.uwo.gold\[2\] is nan"),
        (lambda s: s["phases"].__setitem__("sft", None), "phases.sft is not a number"),
    ],
)
def test_a_wrong_summary_is_refused_where_it_is_wrong(summary, tmp_path, change, message):
    broken = json.loads(json.dumps(summary))
    change(broken)
    with pytest.raises(DataError, match=message):
        validate_summary(broken)
    with pytest.raises(DataError, match=message):
        write_summary(tmp_path, broken)
    assert not list(tmp_path.iterdir())


class Page(HTMLParser):
    """The page's text and links; fails on tags that are not closed in order."""

    VOID = {"meta", "br", "link", "img"}

    def __init__(self, html):
        super().__init__()
        self.text, self.links, self.open = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        self.links += [value for name, value in attrs if name in ("href", "src", "xlink:href", "action")]

    def handle_startendtag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("href", "src", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text.append(data)


def test_the_report_is_one_file_without_network(page):
    html = page.read_text()
    parsed = Page(html)
    assert parsed.open == []
    assert all(link.startswith("#") for link in parsed.links)
    addresses = set(re.findall(r"https?://[^\s\"'<>)]+", html))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # names of the SVG language
    assert len(re.findall("<script(?! type=.application/json)", html)) == 1  # our own
    assert "@import" not in html and "url(http" not in html
    targets = set(re.findall(r'id="([^"]+)"', html))
    assert {link[1:] for link in parsed.links} <= targets


def test_names_and_texts_are_escaped(page):
    html = page.read_text()
    assert "single &lt;b&gt;" in html and "single <b>" not in html and "single \\u003cb\\u003e" in html
    assert "Second &lt;script&gt;." in html and "What &amp; why" in html


def test_the_report_shows_every_headline_number(summary, page):
    text = " ".join(Page(page.read_text()).text)
    shown = []
    for kind, axis in (("runs", "step"), ("best_of_n", "n")):
        for entry in summary[kind].values():
            if entry["peak"] is None:
                continue
            peak = entry["peak"]
            shown += [report.number(peak[place][key]) for place in ("peak", "end") for key in ("gold", "kl", axis)]
            shown += [report.number(peak["start"]["gold"]), report.percent(peak["drop_share"]), peak["verdict"]]
            shown.append(report.number(peak["proxy_change"]))
            shown.append(report.span(entry["gold_low"][-1], entry["gold_high"][-1]))
        for fits in summary["fits"][kind].values():
            shown += [report.number(fits[form][key]) for form in ("bon", "rl") for key in ("alpha", "beta", "r2")]
        for difference in summary["comparisons"][kind]["end_gold_minus_base"].values():
            if kind == "runs":
                shown.append(report.span(difference["low"], difference["high"]))
    for samples in summary["runs"]["uwo"]["samples"].values():
        shown += [sample["completion"] for sample in samples]
    shown += ["12.3 s", "1 min 40 s", "0.712", "tiny <i>", "heads 2", "learning_rate"]
    missing = [value for value in shown if value not in text]
    assert not missing


def test_figures_are_drawn_and_saved(page, summary):
    figures = page.parent / "figures"
    names = {path.stem for path in figures.glob("*.svg")}
    assert names == {path.stem for path in figures.glob("*.png")}
    assert names == {
        "runs_proxy_and_gold", "runs_gold", "runs_steps", "runs_fits",
        "best_of_n_proxy_and_gold", "best_of_n_gold", "best_of_n_fits",
    }  # fmt: skip
    drawn = figures_of(page)
    runs, curves = summary["runs"], summary["best_of_n"]
    judged = {name: entry for name, entry in runs.items() if entry["gold"][0] is not None}
    assert 0 < len(judged) < len(runs)
    assert len(drawn) == len(runs) + 1 + 3 + len(judged) + 2 * len(curves) + 1  # pairs, all gold, by step, fits
    gold = [figure for figure in drawn if figure["y"] == "gold score"]
    by_kl, by_step, by_n = ({curve["name"]: curve for curve in figure["curves"]} for figure in gold)
    for name, entry in judged.items():
        assert by_kl[name]["x"] == entry["x"] and by_step[name]["x"] == entry["step"]
        assert by_kl[name]["y"] == by_step[name]["y"] == entry["gold"] and by_kl[name]["low"] == entry["gold_low"]
    for name, entry in curves.items():
        assert by_n[name]["y"] == entry["gold"] and by_n[name]["labels"][-1] == f"n = {entry['n'][-1]}"
    for figure, entry in zip(drawn, runs.values(), strict=False):
        for curve in figure["curves"]:  # in SD of the initial policy, from 0
            unit, score = entry["unit"], curve["name"]
            last = (entry[score][-1] - unit[f"{score}_zero"]) / unit[f"{score}_sd"]
            assert curve["y"][0] == 0 and curve["y"][-1] == pytest.approx(last)


def test_number_formats():
    cases = {0: "0", 3: "3", 1234567: "1,234,567", 2.0: "2", 0.0123456: "0.0123", -1.234: "−1.23", 12.3456: "12.3",
             123.456: "123", 1234.56: "1,235", 1e-7: "1.00e−07", None: "–"}  # fmt: skip
    assert {value: report.number(value) for value in cases} == cases
    assert report.span(None, 2.5) == "−∞ … 2.50" and report.span(None, None) == ""
    assert report.percent(0.346) == "35 %" and report.percent(-0.02) == "−2 %"
    assert report.cell([{"a": 1}, "x", 0.5, True, None]) == "a 1, x, 0.500, True, –"


def test_an_empty_or_single_evaluation_still_makes_a_report(tmp_path):
    run = read_run(write_run(tmp_path / "run", "short", steps=0))
    summary = build_summary(runs={"short": run})
    path = report.write_report(tmp_path / "report.html", title="Short", intro="One.", summary=summary)
    assert "too few points" in path.read_text()
    path = report.write_report(tmp_path / "empty.html", title="None", intro="Nothing.", summary=build_summary())
    assert "<figure>" not in path.read_text()
