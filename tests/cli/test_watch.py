"""`align watch`: what it serves to whom, from runs that train and are finished, and that texts stay texts."""

import json
import threading
import urllib.error
import urllib.request

import pytest

from align.cli.main import main
from align.cli.watch import Server, make_server
from align.errors import ConfigError
from align.evaluation.metrics_file import MetricsWriter
from align.evaluation.watch import POINTS, snapshot
from tests.browser import needs_chromium, run_in
from tests.evaluation.synthetic import write_run

HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"


@pytest.fixture
def folder(tmp_path):
    """A run of ten logs with a constraint, whose prompts and completions are hostile."""
    run = tmp_path / "run<b>"
    write_run(run, HOSTILE, steps=4)
    path = run / "overoptimization.jsonl"
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


def test_long_runs_are_thinned_and_empty_folders_wait(tmp_path):
    assert snapshot(tmp_path)["step"] is None
    writer = MetricsWriter(tmp_path, {"max_steps": 5000}, None)
    with open(writer.path, "a") as file:
        file.writelines(json.dumps({"step": step, "at": 0, "loss": step}) + "\n" for step in range(5000))
    curve = snapshot(tmp_path)["figures"][0]["curves"][0]
    assert POINTS / 2 < len(curve["x"]) < 1.5 * POINTS and (curve["x"][0], curve["x"][-1]) == (0, 4999)


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


def test_what_cannot_be_watched(tmp_path, server):
    with pytest.raises(ConfigError, match="there is no folder"):
        make_server(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="cannot listen on port"):
        make_server(tmp_path, server.server_address[1])


@needs_chromium
def test_the_page(server, tmp_path):
    dom, console = run_in(server.address, profile=tmp_path / "profile")
    assert console == []
    assert "<title>run&lt;b&gt;</title>" in dom and "step 10 of 40" in dom
    assert dom.count('class="curves"') >= 4 and "polite_above" in dom and "<img" not in dom
    assert "&lt;/script&gt;&lt;img" in dom and dom.count('class="bar"') == 2
