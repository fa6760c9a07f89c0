"""`align watch`: what it serves to whom, from runs that train and are finished, and that texts stay texts."""

import json
import threading
import urllib.error
import urllib.request

import pytest

from align.cli.main import main
from align.cli.watch import Live, Server, make_server
from align.errors import ConfigError, DataError
from align.evaluation import metrics_file, records
from align.evaluation.metrics_file import MetricsWriter
from align.evaluation.report import page_text
from align.evaluation.thin import POINTS, thin
from align.evaluation.watch import snapshot
from tests.browser import ask, needs_chromium, run_in
from tests.evaluation.synthetic import without_checksums, write_run

HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"


@pytest.fixture
def folder(tmp_path):
    """A run of ten logs with a constraint, whose prompts and completions are hostile."""
    run = tmp_path / "run<b>"
    write_run(run, HOSTILE, steps=4)
    path = run / "overoptimization.jsonl"
    without_checksums(path)
    path.write_text(path.read_text().replace("is deep and wide", json.dumps(HOSTILE)[1:-1]))
    writer = MetricsWriter(run, {"method": "PPO", "max_steps": 40, "versions": HOSTILE}, None)
    for step in range(1, 11):
        multiplier = {"constraints/polite_above/multiplier": step / 10, "time/generate": 3.0, "time/train": 1.0}
        writer.write({"step": step, "at": 1.8e9 + step, "loss": 1 / step, "reward": step, **multiplier})
    return run


@pytest.fixture
def server(folder):
    server = make_server(folder)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def get(address: str, **headers):
    with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=5) as answer:
        return answer.read().decode()


def test_the_command(folder, monkeypatch, capsys):
    def interrupt(server):
        raise KeyboardInterrupt

    monkeypatch.setattr(Server, "serve_forever", interrupt)
    assert main(["watch", str(folder)]) == 0
    assert f"watching {folder}: http://127.0.0.1:" in capsys.readouterr().out
    assert main(["watch", str(folder), "--port", "70000"]) == 2
    assert "there is no port 70000" in capsys.readouterr().err


def test_the_state_of_a_run_that_trains(folder):
    state = snapshot(folder)
    assert (state["step"], state["max_steps"], state["ended"]) == (10, 40, False)
    assert state["phases"] == {"generate": 30.0, "train": 10.0}
    figures = {figure["y"]: figure for figure in state["figures"]}
    assert len(figures["proxy and gold score"]["curves"]) == 2 and "KL to the reference (nats)" in figures
    curve = figures["constraints: multiplier"]["curves"][0]
    assert curve["y"][-1] == 1.0 and curve["x"] == list(range(1, 11))
    answers = state["samples"]["sea"]
    assert [answer["step"] for answer in answers] == [0, 10, 20, 30, 40] and HOSTILE in answers[0]["completion"]
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 40, "at": 2, "train_runtime": 9}\n{"ste')
    assert snapshot(folder)["ended"] and snapshot(folder)["step"] == 40


def test_an_empty_folder_waits(tmp_path):
    assert snapshot(tmp_path)["step"] is None


def test_a_thin_curve_keeps_its_outliers_and_its_ends():
    for count in (1, 2, 5, POINTS, 5000, 100_000):
        values = [0.3 + (step % 7) / 100 for step in range(count)]
        values[count // 3], values[count // 2], values[count // 5] = 1e6, -1e6, float("nan")
        values[0] = values[-1] = 0.31
        curve = thin(list(range(count)), values)
        x, y = curve.points()
        assert len(x) <= POINTS and x == sorted(set(x)) and (x[0], x[-1]) == (0, count - 1)
        if count >= POINTS:
            assert len(x) >= POINTS / 2 and (max(filter(None, y)), min(filter(None, y))) == (1e6, -1e6)
            assert curve.not_finite_from == count // 5
        if count == 5:
            assert y == [0.31, None, -1e6, values[3], 0.31]
    assert thin([1, 2, 3], [1, None, float("inf")]).points() == ([1, 2, 3], [1, None, None])
    assert thin([], []).points() == ([], [])


def test_a_poll_reads_only_what_was_appended(folder, monkeypatch):
    def lines(*steps):
        return "".join(json.dumps({"step": step, "at": 0, "loss": step, "time/train": 1.0}) + "\n" for step in steps)

    parsed = []
    one_line = metrics_file._parsed
    monkeypatch.setattr(metrics_file, "_parsed", lambda line, *place: parsed.append(line) or one_line(line, *place))
    read_run, evaluations = records.read_run, []
    monkeypatch.setattr(records, "read_run", lambda path: evaluations.append(path) or read_run(path))
    live = Live(folder)
    first = json.loads(live.state(None))
    assert len(parsed) == 11 and len(evaluations) == 1 and "samples" not in first
    version = str(first["version"])
    assert json.loads(live.state(version)) == {"version": first["version"], "unchanged": True}
    path = folder / "metrics.jsonl"
    with open(path, "a") as file:
        file.write(lines(11, 12) + '{"step": 13')
    second = json.loads(live.state(version))
    assert len(parsed) == 13 and len(evaluations) == 1 and second["step"] == 12 and second["phases"]["train"] == 12
    with open(path, "a") as file:
        file.write(', "loss": 5}\n')
    assert json.loads(live.state(str(second["version"])))["step"] == 13 and len(parsed) == 14
    MetricsWriter(folder, {"method": "PPO", "max_steps": 50}, 5)  # resumed: the file was replaced
    resumed = json.loads(live.state(None))
    assert (resumed["step"], resumed["max_steps"], resumed["phases"]["train"]) == (5, 50, 5)
    path.unlink()
    assert json.loads(live.state(None))["step"] is None


def test_completions_come_on_request(server):
    state = json.loads(get(server.address.replace("/?", "/state.json?")))
    assert state["prompts"] == ["sea", "forest", "city"]
    answers = json.loads(get(server.address.replace("/?", "/samples.json?") + "&prompt=1"))
    assert [answer["step"] for answer in answers] == [0, 10, 20, 30, 40] and "forest" in answers[0]["completion"]
    for prompt in ("3", "-1", "x", ""):
        assert json.loads(get(server.address.replace("/?", "/samples.json?") + f"&prompt={prompt}")) == []


def test_numbers_that_are_not_finite_are_null(folder):
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 11, "at": 2, "loss": NaN, "reward": Infinity}\n')
    state = json.loads(Live(folder).state(None), parse_constant=pytest.fail)
    figures = {figure["y"]: figure["curves"][0]["y"][-1] for figure in state["figures"]}
    assert figures["loss"] is figures["reward"] is None and state["not_finite"] == {"loss": 11, "reward": 11}


def test_only_with_the_token_and_this_machines_name(server):
    assert json.loads(get(server.address.replace("/?", "/state.json?")))["step"] == 10
    assert server.server_address[0] == "127.0.0.1"
    wrong = [(server.address.partition("?")[0], {}), (server.address[:-1], {})]
    for address, headers in (*wrong, (server.address, {"Host": "evil.example:80"})):
        with pytest.raises(urllib.error.HTTPError, match="403"):
            get(address, **headers)
    with pytest.raises(urllib.error.HTTPError, match="404"):
        get(server.address.replace("/?", "/../metrics.jsonl?"))


def test_a_damaged_file_is_said_on_the_page(server, folder):
    (folder / "metrics.jsonl").write_text("{\n")
    assert "line 1 is not valid JSON" in json.loads(get(server.address.replace("/?", "/state.json?")))["error"]


def edited(line: int, change):
    """An evaluation file with one line changed."""

    def edit(path):
        lines = path.read_text().splitlines()
        value = json.loads(lines[line])
        lines[line] = json.dumps(change(value) or value)
        path.write_text("\n".join(lines) + "\n")

    return edit


def constrained(path, weights=None):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0]["config"] |= {"constraints": [{"reward": "short"}], "reward_weights": weights}
    for record in lines[1:]:
        for name in ("good", "short"):
            key = f"rewards/{name}"
            record[key], record["per_prompt"][key] = record["proxy"], record["per_prompt"]["proxy"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def lost_reward(path):
    constrained(path)
    edited(2, lambda record: record["per_prompt"].pop("rewards/good") and None)(path)


@pytest.mark.parametrize("damage, sentence", [
    (lambda path: path.write_text(path.read_text() + "{\n"), "line 7 is not valid JSON"),
    (edited(0, lambda header: header.update(config=None)), "config of the header"),
    (edited(2, lambda record: record["samples"][1].pop("prompt") and None), "line 3: sample 1 has no prompt"),
    (edited(2, lambda record: record.update(samples=5)), "line 3: samples must be a list"),
    (edited(2, lambda record: record.update(step="x")), "line 3: step is 'x'"),
    (edited(2, lambda record: record.update(per_prompt=[1])), "line 3: per_prompt must hold"),
    (lost_reward, "not every evaluation has the scores of the reward 'good' of the first"),
    (lambda path: constrained(path, [1.0]), "1 reward_weights for 2 rewards"),
])  # fmt: skip
def test_a_damaged_evaluation_file_is_said(folder, damage, sentence, tmp_path, capsys):
    damage(folder / "overoptimization.jsonl")
    live = Live(folder)
    assert sentence in json.loads(live.state(None))["error"] and sentence in json.loads(live.state(None))["error"]
    with pytest.raises(DataError, match="overoptimization.jsonl"):
        snapshot(folder)
    assert main(["overoptimization", str(folder), "--output_dir", str(tmp_path / "out")]) == 2
    assert sentence in capsys.readouterr().err


def test_a_file_that_cannot_be_read_is_said_and_one_without_evaluations_is_none(folder):
    live, path = Live(folder), folder / "overoptimization.jsonl"
    path.write_text(path.read_text().splitlines()[0] + "\n")
    assert json.loads(live.state(None))["prompts"] == []
    path.unlink()
    path.mkdir()
    assert "Is a directory" in json.loads(live.state(None))["error"]
    path.rmdir()
    assert json.loads(live.state(None))["step"] == 10


def test_what_cannot_be_watched(tmp_path, server):
    with pytest.raises(ConfigError, match="there is no folder"):
        make_server(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="cannot listen on port"):
        make_server(tmp_path, server.server_address[1])


@needs_chromium
def test_the_page(server, folder, tmp_path):
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 11, "at": 2, "loss": NaN, "a": 3}\n')
    dom, console = run_in(server.address, profile=tmp_path / "profile")
    assert console == []
    assert "<title>run&lt;b&gt;</title>" in dom and "step 11 of 40" in dom and "loss is not finite from step 11" in dom
    assert dom.count('class="curves"') >= 4 and "polite_above" in dom and "<img" not in dom
    assert "&lt;/script&gt;&lt;img" in dom and dom.count('class="bar"') == 2


LATER = """
const figure = y => ({x: "step", y, curves: [{name: y, x: [1, 2], y: [1, 2]}]});
const state = (...figures) => ({step: 1, max_steps: 2, header: {}, phases: {}, not_finite: {}, prompts: [], figures});
const names = () => Array.from(element("figures").children, place =>
  place.querySelector("svg") ? place.id : place.textContent);
const found = [];
for (const now of [[figure("a"), figure("b")], [figure("new"), figure("a"), figure("b")], [figure("b"), {y: "bad"}]]) {
  draw(state(...now));
  found.push(names());
}
const many = Array.from({length: 200000}, (_, i) => i), place = make("div");
drawCurves(place, {x: "step", y: "many", curves: [{name: "many", x: many, y: many}]});
return [...found, extent(many), ticks(2, 8, "log"), ticks(1, 1e6, "log"), ticks(3.1, 3.9, "log").length > 1];
"""


@needs_chromium
def test_figures_come_and_go_and_one_that_cannot_be_drawn_says_so(tmp_path):
    page = tmp_path / "page.html"
    page.write_text(page_text("watch.html.j2", name="run").replace("ask();\n</script>", "</script>"))
    found, console = ask(page, LATER, tmp_path)
    assert found[:2] == [["figure-a", "figure-b"], ["figure-new", "figure-a", "figure-b"]]
    assert found[2][0] == "figure-b" and found[2][1].startswith("this figure cannot be drawn") and len(console) == 1
    decades = [10**n for n in range(7)]
    assert found[3:] == [[0, 199999], [2, 5], decades, True]
