"""The remote reward against real servers on this machine."""

import json
import socket
import threading
import time
from contextlib import contextmanager
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from align.errors import ConfigError, RewardError
from align.reward_models import remote
from align.reward_models.base import RewardBatch
from align.reward_models.build import build_reward, check_reward
from align.reward_models.remote import RemoteReward

BATCH = RewardBatch(
    ["p"] * 5,
    ["a", "bb", "ccc", "dddd", "eeeee"],
    columns={"answer": list("vwxyz"), "other": [0] * 5},
    rows=[*range(20, 25)],
)
LENGTHS = [1.0, 2.0, 3.0, 4.0, 5.0]


@pytest.fixture(autouse=True)
def a_proxy_that_is_not_there(monkeypatch):
    """As on many clusters: it is for other machines."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")


def lengths(content):
    return {"scores": [len(c) for c in content["completions"]]}


@contextmanager
def server(answer=lengths, statuses=(), delay=0.0, retry_after=None):
    """answer(request content) -> what to send back (text is sent as it is). statuses: of the first requests."""
    seen, lock, statuses = [], threading.Lock(), list(statuses)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                seen.append((time.monotonic(), dict(self.headers), content))
                status = statuses.pop(0) if statuses else 200
            time.sleep(delay)
            body = answer(content) if status == 200 else "not now"
            body = (body if isinstance(body, str) else json.dumps(body)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            if retry_after is not None and status != 200:
                self.send_header("Retry-After", str(retry_after))
            self.end_headers()
            try:
                self.wfile.write(body)
            except ConnectionError:
                pass  # the client has given up waiting

        def log_message(self, *args):
            pass

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{made.server_port}/score", seen
    finally:
        made.shutdown()
        made.server_close()


def test_batches_columns_and_headers(monkeypatch, tmp_path):
    """Headers of the spec are what is sent, whatever ~/.netrc has for a host."""
    monkeypatch.setenv("TOKEN_OF_TEST", "s3cret")
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password other\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr(remote, "LOOPBACK", ())  # as for a server on another machine
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with server() as (url, seen):
        reward = RemoteReward(
            url, name="judge", columns=["answer"], batch_size=2, headers={"Authorization": "Bearer $TOKEN_OF_TEST"}
        )
        assert seen == []
        assert reward.score(BATCH).scores.tolist() == LENGTHS
    assert sorted(content["completions"] for _, _, content in seen) == [["a", "bb"], ["ccc", "dddd"], ["eeeee"]]
    (first,) = [content for _, _, content in seen if content["completions"] == ["a", "bb"]]
    assert first == {"prompts": ["p", "p"], "completions": ["a", "bb"], "columns": {"answer": ["v", "w"]}}
    assert all(headers["Authorization"] == "Bearer s3cret" for _, headers, _ in seen)


def test_requests_run_together_and_keep_their_order():
    def slower_for_the_first(content):
        time.sleep(0.2 if content["completions"] == ["a"] else 0.0)
        return lengths(content)

    with server(slower_for_the_first, delay=0.2) as (url, seen):
        start = time.monotonic()
        assert RemoteReward(url, batch_size=1, concurrency=5).score(BATCH).scores.tolist() == LENGTHS
        assert time.monotonic() - start < 0.9 and len(seen) == 5  # one after the other: 1.2 s


def test_conversations_are_sent_as_messages():
    messages = [[{"role": "assistant", "content": "yes"}]]
    with server(lambda content: {"scores": [len(content["completions"][0][0]["content"])]}) as (url, _):
        assert RemoteReward(url).score(RewardBatch([[{"role": "user", "content": "?"}]], messages)).scores.tolist() == [
            3.0
        ]


def test_passing_failures_are_tried_again():
    with server(statuses=[503, 429, 500]) as (url, seen):
        assert RemoteReward(url, backoff=0.05).score(BATCH).scores.tolist() == LENGTHS
        times = [at for at, _, _ in seen]
        assert len(times) == 4 and times[2] - times[1] >= 0.1 and times[3] - times[2] >= 0.2  # the waits double
    with server(statuses=[503], retry_after=1) as (url, seen):
        assert RemoteReward(url, backoff=0).score(BATCH).scores.tolist() == LENGTHS
        assert 1.0 <= seen[1][0] - seen[0][0] < 3
    with server(statuses=[503] * 9) as (url, seen):
        with pytest.raises(
            RewardError, match="'judge' at http://127.0.0.1:.*answered 503 .*and so it did 3 times: 'not now'"
        ):
            RemoteReward(url, name="judge", retries=2, backoff=0).score(BATCH)
        assert len(seen) == 3


def test_every_5xx_is_passing():
    """Those of proxies (529, 524) too."""
    with server(statuses=[529, 501, 524]) as (url, seen):
        assert RemoteReward(url, backoff=0).score(BATCH).scores.tolist() == LENGTHS and len(seen) == 4


@pytest.mark.parametrize("value", [float("nan"), datetime(2026, 1, 1)])
def test_a_column_that_is_no_json_is_named_as_such(value):
    batch = RewardBatch(["p"], ["a"], columns={"when": [value]}, rows=[20])
    with pytest.raises(
        RewardError, match="'remote' .*\\(\\[20\\] of the dataset\\): .*sent is no JSON .*leave that column"
    ):
        RemoteReward("http://127.0.0.1:9/score", columns=["when"]).score(batch)


def test_other_failures_are_final():
    with server(statuses=[401, 401]) as (url, seen):
        with pytest.raises(
            RewardError, match="rows \\[0, 1, 2, 3, 4\\] of the batch .*answered 401 Unauthorized: 'not now'"
        ):
            RemoteReward(url, backoff=0).score(BATCH)
        assert len(seen) == 1
    with server(statuses=[302]) as (url, _):
        with pytest.raises(RewardError, match="answered 302"):
            RemoteReward(url, backoff=0).score(BATCH)


def test_a_server_that_is_down():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        url = f"http://user:s3cret@127.0.0.1:{taken.getsockname()[1]}/score?key=s3cret"
        with pytest.raises(
            RewardError, match="no connection, tried 3 times .*Start the server, or fix the url"
        ) as caught:
            RemoteReward(url, retries=2, backoff=0).score(BATCH)
    message = str(caught.value)
    assert "127.0.0.1" in message and "(rows" not in message and "rows [0, 1, 2, 3, 4] of the batch" in message
    assert "s3cret" not in message


def test_a_server_that_is_slow():
    with server(delay=1.0) as (url, seen):
        with pytest.raises(
            RewardError, match="no answer within 0.2 s, tried 2 times.*raise timeout, or lower batch_size"
        ):
            RemoteReward(url, timeout=0.2, retries=1, backoff=0).score(BATCH)
        assert len(seen) == 2


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"scores": [1.0]}, "1 scores came back for 2 completions"),
        ({"scores": [1.0, 2.0, 3.0]}, "3 scores came back for 2 completions"),
        ({"scores": [1.0, None]}, "the score is None for rows \\[3\\] of the batch \\(\\[23\\] of the dataset\\)"),
        ('{"scores": [NaN, 1.0]}', "the score is nan for rows \\[2\\] of the batch"),
        ('{"scores": [1e999, 1.0]}', "the score is inf for rows \\[2\\]"),
        ({"scores": ["1", 2]}, "the score is '1' for rows"),
        ({"rewards": [1.0, 2.0]}, "the answer is not {'scores': \\[...\\]}"),
        ([1.0, 2.0], "the answer is not {'scores'"),
        ("<html>hello</html>", "the answer is no JSON: '<html>hello</html>'"),
    ],
)
def test_what_is_no_score_is_refused(answer, message):
    """Two requests, the second of which is answered badly."""
    with server(lambda content: lengths(content) if content["completions"][0] == "a" else answer) as (url, _):
        with pytest.raises(RewardError, match=f"'judge' at http.*{message}"):
            RemoteReward(url, name="judge", batch_size=2, concurrency=1).score(BATCH.select(range(4)))


def test_specs_send_nothing():
    """Neither making nor checking a spec asks the server, so a dry run does not either."""
    with server() as (url, seen):
        spec = {"type": "remote", "url": url, "name": "judge", "timeout": 5}
        check_reward(spec)
        reward = build_reward(spec)
        assert seen == [] and reward.name == "judge"
        assert reward.score(BATCH).scores.tolist() == LENGTHS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "localhost:8000/score"}, "url must be http"),
        ({"url": "http:///score"}, "url must be http"),
        ({"url": "http://x", "batch_size": 0}, "batch_size: input should be greater than or equal to 1, not 0"),
        ({"url": "http://x", "retries": -1}, "retries: input should be greater than or equal to 0"),
        ({"url": "http://x", "timeout": 0}, "timeout: input should be greater than 0"),
        ({"url": "http://x", "headers": {"A": "${NOT_SET_ANYWHERE}"}}, "header A needs .* NOT_SET_ANYWHERE, not set"),
        ({"url": "http://x", "timout": 3}, "unknown key reward.timout of a remote reward; nearest valid: timeout"),
        ({"name": "x"}, "a remote reward needs 'url'"),
    ],
)
def test_specs_that_describe_nothing(options, message):
    for function in (build_reward, check_reward):
        with pytest.raises(ConfigError, match=message):
            function({"type": "remote", **options})


def test_a_column_that_is_missing():
    with pytest.raises(RewardError, match="no column target to send \\(it has answer, other\\)"):
        RemoteReward("http://x", columns=["target"]).score(BATCH)
