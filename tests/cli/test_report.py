"""`align report`: runs of two methods on one page, which draws them."""

import json

from align.cli.main import main
from align.evaluation.metrics_file import MetricsWriter
from align.evaluation.runs_report import compare_runs, write_runs_report
from tests.browser import ask, needs_chromium
from tests.evaluation.synthetic import write_run

HOSTILE = "</script><img src=x onerror=y()>"


def write(folder, method, **settings):
    header = {"method": method, "max_steps": 3, "processes": 1, "versions": "torch 2", "settings": settings}
    writer = MetricsWriter(folder, header, None)
    with open(writer.path, "a") as file:
        file.write('{"step": 1, "at": 0, "grad_norm": NaN, "loss": -Infinity}\n')
    for step in range(1, 4):
        writer.write({"step": step, "at": 0, "loss": step, f"of_{method}": 1.0, "time/train": 2.0})
    return folder


def test_two_methods(tmp_path, capsys):
    one = write(tmp_path / "a", "DPO", beta=0.1, learning_rate=1e-6)
    two = write(tmp_path / HOSTILE.replace("/", "|"), "ReMax", learning_rate=1e-6, seed=HOSTILE)
    write_run(two, "remax", steps=2)
    page = tmp_path / "page.html"
    assert main(["report", str(one), str(two), "--output", str(page)]) == 0
    found = compare_runs({"a": one, "b": two})
    assert set(found["differ"]) == {"method", "beta", "seed"} and "learning_rate" in found["same"]
    assert found["differ"]["beta"] == {"a": 0.1, "b": None} and found["phases"]["a"] == {"train": 6.0}
    loss = next(figure for figure in found["figures"] if figure["y"] == "loss")
    assert [curve["name"] for curve in loss["curves"]] == ["a: loss", "b: loss"]
    assert loss["curves"][0]["y"] == [None, 1, 2, 3]
    assert found["samples"]["sea"]["b"]["step"] == 20
    html = page.read_text()
    json.dumps(found, allow_nan=False)
    assert "a logged numbers that are not finite: grad_norm from step 1, loss from step 1" in html
    assert "<img" not in html and json.dumps(HOSTILE)[1:-1] not in html


@needs_chromium
def test_every_figure_is_drawn(tmp_path):
    runs = {name: write(tmp_path / name, name) for name in ("dpo", "remax")}
    page = write_runs_report(tmp_path / "page.html", runs)
    drawn, console = ask(page, "return document.querySelectorAll('.curves svg').length", tmp_path)
    assert console == [] and drawn == len(compare_runs(runs)["figures"]) == 4


def test_what_is_no_run(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no metrics.jsonl" in capsys.readouterr().err
    folder = write(tmp_path / "a", "DPO")
    for same in (folder, tmp_path / "b" / ".." / "a"):
        assert main(["report", str(folder), str(same)]) == 2
        assert "is given twice" in capsys.readouterr().err
    assert main(["report", str(folder), "--output", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err and sorted(tmp_path.iterdir()) == [folder]
