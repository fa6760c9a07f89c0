"""A server that breaks off, drips, or answers with what Python cannot hold."""

import socketserver
import threading
import time
from contextlib import contextmanager

import pytest

from align.errors import RewardError
from align.reward_models.base import RewardBatch
from align.reward_models.beside import Threads
from align.reward_models.remote import RemoteReward

BATCH = RewardBatch(["p"], ["a"], rows=[20])
HEAD = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
WHOLE = HEAD % 17 + b'{"scores": [0.5]}'


@pytest.fixture(autouse=True)
def a_proxy_that_is_not_there(monkeypatch):
    """As on many clusters: it is for other machines."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")


@contextmanager
def server(*answers):
    """Each connection gets the next answer, the last one again and again: bytes, or a function of the socket."""
    left, seen = list(answers), []

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            asked = b""
            while not asked.endswith(b"}}"):  # what is not read when it closes would reset the connection
                asked += self.request.recv(65536)
            answer = left.pop(0) if len(left) > 1 else left[0]
            seen.append(answer)
            answer(self.request) if callable(answer) else self.request.sendall(answer)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads, block_on_close = True, False

    made = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{made.server_address[1]}/score", seen
    finally:
        made.shutdown()
        made.server_close()


def test_an_answer_that_breaks_off_is_asked_for_again():
    with server(WHOLE[:-5], WHOLE[:-1], WHOLE) as (url, seen):
        assert RemoteReward(url, backoff=0.01).score(BATCH).scores.tolist() == [0.5] and len(seen) == 3
    with server(WHOLE[:-5]) as (url, seen):
        with pytest.raises(RewardError, match="rows \\[0\\] .*the answer broke off, tried 3 times"):
            RemoteReward(url, backoff=0.01, retries=2).score(BATCH)
        assert len(seen) == 3


def drips(socket):
    socket.sendall(HEAD % 10_000)
    for _ in range(300):
        try:
            socket.sendall(b" ")
        except OSError:
            return
        time.sleep(0.05)


def drips_headers(socket):
    socket.sendall(b"HTTP/1.1 200 OK\r\nX: ")
    drips(socket)


@pytest.mark.parametrize("answer", [drips, drips_headers])
def test_a_server_that_drips_is_bounded(answer):
    with server(answer) as (url, _):
        reward = RemoteReward(url, timeout=0.2, retries=0)
        assert reward.deadline == pytest.approx(30.4)
        reward.deadline = 0.6  # without what the waits of a server that says when may take
        start = time.monotonic()
        with pytest.raises(RewardError, match="no whole answer within 0.6 s, all attempts together"):
            reward.score(BATCH)
        assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"scores": [' + b"9" * 5000 + b"]}", "thousands of digits"),
        (b'{"scores": [' + b"9" * 400 + b"]}", "the score is 999.* for rows \\[0\\]"),
        (b'{"scores": [1e999]}', "the score is inf for rows"),
        (b"[" * 200_000, "the answer (is no JSON|holds .*lists within lists)"),
        (b"\xff\xfe\x00", "the answer is no JSON"),
    ],
)
def test_answers_that_are_no_scores(body, message):
    with server(HEAD % len(body) + body) as (url, _):
        with pytest.raises(RewardError, match=message):
            RemoteReward(url, retries=0).score(BATCH)


def test_a_thread_whose_work_failed_begins_no_more():
    """The next request would be tried as often, and waited for."""
    threads, begun = Threads(1), []
    failed, _ = threads.begin(lambda: 1 / 0), threads.begin(lambda: begun.append(1))
    threads.stop(wait=True)
    assert isinstance(failed.exception(), ZeroDivisionError) and not begun
