"""What a server answers that is none of `align serve`, or one of another version."""

import asyncio
import json
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from transformers import LlamaConfig

from align.errors import ConfigError, RolloutError
from align.rollout.engine import RolloutEngine
from align.rollout.server import folder
from align.rollout.server.client import Server, ServerLost, beside, session
from align.rollout.server.delivery import Parcel, locked
from align.rollout.server.engine import ServerEngine


@pytest.fixture
def answering():
    """A server on this machine that answers everything with one text, or as `answers` says, and its address."""

    class Handler(BaseHTTPRequestHandler):
        text = b""

        def answers(self, body):
            return self.text

        def do_POST(self):
            text = self.answers(self.rfile.read(int(self.headers.get("Content-Length", 0))))
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST

        def log_message(self, *args):
            pass

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield Handler, f"http://127.0.0.1:{made.server_port}"
    made.shutdown()
    made.server_close()


@pytest.mark.parametrize(
    "text",
    [b"{}", b"[]", b"{", b'{"results": []}', b'{"results": [{"reason": null, "parts": {}}]}', b'{"data": [], "x": 1}'],
)
def test_an_answer_of_another_form_names_the_server(answering, text):
    Handler, url = answering
    Handler.text = text

    async def ask(question):
        async with session() as http:
            return await getattr(Server(url, "key", 5.0), question)(http)

    for question in ("describe", "label", "adapter_names"):
        if question == "adapter_names" and b"data" in text:
            assert asyncio.run(ask(question)) == []
            continue
        with pytest.raises(RolloutError, match=f"{url} answered /.* cannot read .*start it with `align serve` of the"):
            asyncio.run(ask(question))


def test_a_server_that_comes_back_as_another_one_is_named(answering, tmp_path):
    """Before it is given weights, of which it would say in words of its own that they do not fit."""
    Handler, url = answering
    worker = {"reason": None, "parts": {"other": []}, "max_num_seqs": 1, "adapters": [], "dtype": "float32"}
    known = {"align_label": "", "align_describe": {**worker, "device": "cpu", "gpu": None, "config": {}}}

    def answers(self, body):
        results = [known[json.loads(body)["method"]]] if body else []
        return json.dumps({"results": results, "data": [{"max_model_len": 8}]}).encode()

    Handler.answers = answers
    engine = object.__new__(ServerEngine)
    engine._folder, engine._run, engine._pushes, engine.wait_limit = tmp_path, "run", 1, 5.0
    engine._needs = {"names": ["weight"], "dtype": torch.float32, "longest": 8, "config": None}
    with pytest.raises(RolloutError, match=f"{url} was started for another model"):
        asyncio.run(engine._with_session(partial(engine._come_back, Server(url, "key", 5.0))))
    known["align_label"] = "another:3"
    with pytest.raises(RolloutError, match=f"{url} has the weights of another run .another."):
        asyncio.run(engine._with_session(partial(engine._come_back, Server(url, "key", 5.0))))


def ask(url: str, method: str, path: str, body: dict | None = None):
    async def asked():
        async with session() as http:
            return await Server(url, "key", 5.0).call(http, method, path, body)

    return asyncio.run(asked())


def test_a_connection_that_breaks_off_is_tried_once_more_where_that_is_safe(answering):
    """A healthy server breaks off one under load; a part of a push is not sent twice."""
    Handler, url = answering
    broken, answer = [], Handler.do_POST

    def breaks_off(self):
        if broken.count(self.path) < allowed:
            broken.append(self.path)
        else:
            answer(self)

    Handler.text, Handler.do_POST, Handler.do_GET, allowed = b"[1]", breaks_off, breaks_off, 1
    for method, path in (("POST", "/collective_rpc"), ("POST", "/inference/v1/generate"), ("GET", "/v1/models")):
        assert ask(url, method, path) == [1] and broken == [path]
        broken.clear()
    with pytest.raises(ServerLost, match=f"{url} broke off the connection before it had answered /update_weights .Ser"):
        ask(url, "POST", "/update_weights", {})
    allowed = 2
    with pytest.raises(ServerLost, match=f"{url} broke off the connection before it had answered /collective_rpc "):
        ask(url, "POST", "/collective_rpc", {})
    assert broken == ["/update_weights"] + ["/collective_rpc"] * 2


def test_a_server_that_is_being_ended_is_lost_though_it_says_that_it_is_healthy(answering):
    """vLLM ends its engine first, and answers calls of it with 500. A failure of a healthy engine is another error."""
    Handler, url = answering
    failing = ["align_label", "check_health"]

    def post(self):
        text = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(500 if text and json.loads(text)["method"] in failing else 200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    Handler.do_POST = Handler.do_GET = post
    with pytest.raises(ServerLost, match=f"{url} answered /collective_rpc with status 500: .*Its engine does"):
        ask(url, "POST", "/collective_rpc", {"method": "align_label"})
    failing.remove("check_health")
    with pytest.raises(RolloutError, match=f"{url} answered /collective_rpc with status 500") as error:
        ask(url, "POST", "/collective_rpc", {"method": "align_label"})
    assert not isinstance(error.value, ServerLost)


def test_a_server_that_was_started_anew_is_probed_at_the_next_push(answering, tmp_path, monkeypatch):
    """Weights and shapes are right where the configuration is another one; another one of the model's is refused at
    once, before anything is drawn from it."""
    Handler, url = answering
    worker = {"reason": None, "parts": {"weight": []}, "max_num_seqs": 1, "adapters": [], "dtype": "float32"}
    worker |= {"device": "cpu", "gpu": None, "config": {"rope_theta": 1e4, "transformers_version": "5.16"}}

    def answers(self, body):
        asked = json.loads(body) if body else {}
        found = worker if asked.get("method") == "align_describe" else (asked.get("args") or [""])[0]
        return json.dumps({"results": [found], "data": [{"max_model_len": 8}]}).encode()

    Handler.answers, probed = answers, []
    engine = object.__new__(ServerEngine)
    engine._folder, engine._run, engine._pushes, engine.wait_limit = tmp_path, "run", 1, 5.0
    engine._needs = {"names": ["weight"], "dtype": torch.float32, "longest": 8, "config": LlamaConfig()}
    engine._parcel, engine._sent, engine._anew, engine.weight_version = Parcel("run:1", whole=True), {}, False, 1
    monkeypatch.setattr(RolloutEngine, "push", lambda *args: "report")
    engine.probe = probed.append
    assert engine.push("model", 2) == "report" and not probed
    server = Server(url, "key", 5.0)
    asyncio.run(engine._with_session(partial(engine._come_back, server)))
    engine.push("model", 3)
    assert engine.push("model", 4) == "report" and probed == ["model"]
    worker["config"] = {"rope_theta": 1e4, "transformers_version": "5.17"}
    asyncio.run(engine._with_session(partial(engine._come_back, server)))
    worker["config"] = {"rope_theta": 1e6}
    with pytest.raises(RolloutError, match=f"{url} came back with another conf.* .rope_theta: 10000.0 before, 1000000"):
        asyncio.run(engine._with_session(partial(engine._come_back, server)))


def test_what_this_process_does_itself_has_a_limit_too():
    """NCCL waits for members that never come, in a call that nothing ends: the run would, and so would its end."""
    stuck, ended = threading.Event(), []
    with pytest.raises(RolloutError, match="could not send weights within 0.1 seconds .rollout.timeout."):
        asyncio.run(beside(stuck.wait, 0.1))
    stuck.set()
    asyncio.run(beside(lambda: ended.append(1), 60))
    assert ended == [1]
    with pytest.raises(ZeroDivisionError):
        asyncio.run(beside(lambda: 1 / 0, 60))


def test_who_waits_for_a_stopped_process_of_the_run_says_so(tmp_path):
    async def both():
        async with locked(tmp_path / "lock", 1.0):
            async with locked(tmp_path / "lock", 0.3):
                pass

    with pytest.raises(RolloutError, match=r"wait_limit \(0.3 seconds\)"):
        asyncio.run(both())
    asyncio.run(again(tmp_path / "lock"))  # nothing holds it any more


async def again(path):
    async with locked(path, 0.1):
        pass


KILLED = """
import os, signal, sys
from pathlib import Path
from align.rollout.server.folder import new_folder
(Path(new_folder(Path(sys.argv[1]))) / "weights").touch()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_weights_that_a_killed_run_left_in_memory_are_removed_by_the_next(tmp_path, monkeypatch):
    """With `on_engine_failure: wait` they are the whole model: each killed run left so much less memory."""
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)])
    (left,) = tmp_path.iterdir()
    assert (left / "weights").exists()
    shared = folder.new_folder(tmp_path)  # of a folder that machines may share, locks say nothing
    assert left.exists()
    monkeypatch.setattr(folder, "MEMORY", str(tmp_path))
    own = folder.new_folder(tmp_path)
    assert {str(one) for one in tmp_path.iterdir()} == {own, shared}  # those of runs that live
    folder.remove_folder(own)
    folder.remove_folder(shared)
    assert not list(tmp_path.iterdir()) and not folder._kept
    with pytest.raises(ConfigError, match="transfer_folder: .*nowhere is not a folder that can be written to"):
        folder.new_folder(tmp_path / "nowhere")
