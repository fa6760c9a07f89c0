"""Reward functions and servers that do what they should not: each batch gets its true scores, or one sentence."""

import json
import socketserver
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

from align.errors import AlignError
from align.reward_models.base import RewardBatch
from align.reward_models.remote import RemoteReward
from align.reward_models.rules import RuleReward
from benchmarks.faults.tally import Tally

PATIENCE = 60.0


class Stop(BaseException):
    """No Exception: what catches those does not catch it."""


class Strange:
    """A list that has no length, no items and no text."""

    def __getattr__(self, name):
        raise RuntimeError(name)

    def __repr__(self):
        raise RuntimeError("no text")


class StrangeNumber(float):
    def __abs__(self):
        raise RuntimeError("no size")

    def __repr__(self):
        raise RuntimeError("no text")


def raising(error: BaseException) -> Callable:
    def function(completions, **columns):
        raise error

    return function


def returning(value) -> Callable:
    def function(completions, **columns):
        return value

    return function


def for_ever(completions, **columns):
    while True:
        time.sleep(0.01)


def busy(completions, **columns):
    import re

    return [float(bool(re.match(r"(a+)+$", "a" * 40 + "b")))]


def keeps_on(completions, **columns):
    while True:
        try:
            time.sleep(1)
        except Exception:
            continue


async def blocks(completions, **columns):
    time.sleep(3)
    return [1.0, 2.0]


def mutates(completions, prompts, completion_ids, word, **columns):
    scores = [float(len(text)) for text in completions]
    completions[:], prompts[:], word[:] = ["x"] * 9, [], [None]
    for ids in completion_ids:
        ids.clear()
    return scores


def logs_nonsense(completions, log_extra, log_metric, **columns):
    log_extra("a", [1])
    return [1.0, 2.0]


def measures_nonsense(completions, log_metric, **columns):
    log_metric("a", "three")
    return [1.0, 2.0]


VALUES = [
    *(None, [], [1.0], [1.0, 2.0, 3.0], "ab", {"a": 1, "b": 2}, 1.0, [[1.0], [2.0]], [float("nan"), 1.0]),
    *([float("inf"), 1.0], [1.0, -float("inf")], [10**400, 1.0], [1e39, 1.0], ["1", "2"], [1 + 0j, 2.0], [b"1", 2.0]),
    *(
        [Decimal("NaN"), 1.0],
        [Decimal(1), 1.0],
        [Strange(), 1.0],
        Strange(),
        (x for x in "ab"),
    ),
    *(torch.tensor([1.0, float("nan")]), torch.ones(2, 1), torch.ones(3), np.array(["a", "b"]), np.ones(()), range(2)),
    *(np.array([1.0, np.inf]), torch.tensor([1.0 + 0j, 2.0]), [None, "x"], [object(), 1.0], lambda: 1, [[], []]),
]
TRUE = {  # what are scores, and which
    "ints": (returning([1, 2]), [1.0, 2.0]),
    "truth": (returning([True, False]), [1.0, 0.0]),
    "fractions": (returning([Fraction(1, 2), 2]), [0.5, 2.0]),
    "numpy": (returning(np.array([1, 2])), [1.0, 2.0]),
    "tensor": (returning(torch.tensor([1.5, 2.5])), [1.5, 2.5]),
    "strange numbers": (returning([StrangeNumber(1), 1.0]), [1.0, 1.0]),  # a number for all that
    "scalars": (returning([np.float32(1.5), torch.tensor(2.5).item()]), [1.5, 2.5]),
    "mutates": (mutates, [3.0, 2.0]),
    "blocks": (blocks, [1.0, 2.0]),  # for less than what a batch of calls may take
}
FUNCTIONS = {
    **{f"returns {number}: {type(value).__name__}": returning(value) for number, value in enumerate(VALUES)},
    **{
        f"raises {type(error).__name__}": raising(error)
        for error in (
            *(
                ValueError("x\ny"),
                KeyError("a"),
                MemoryError(),
                RecursionError("deep"),
                StopIteration(),
                Stop(),
                SystemExit(0),
            ),
            *(
                GeneratorExit(),
                OSError(28, "No space left on device"),
                UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
            ),
            *(
                TimeoutError(),
                ConnectionResetError(),
                AssertionError(),
                StopAsyncIteration(),
                ExceptionGroup("g", [OSError()]),
            ),
        )
    },
    **{f.__name__: f for f in (for_ever, busy, keeps_on, logs_nonsense, measures_nonsense)},
}
HEAD = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
BODIES = [
    *(
        b"",
        b"{}",
        b"[]",
        b"null",
        b'{"scores": null}',
        b'{"scores": [1]}',
        b'{"scores": [1, 2, 3]}',
        b'{"scores": "ab"}',
    ),
    *(b'{"scores": [NaN, 1]}', b'{"scores": [Infinity, 1]}', b'{"scores": [null, 1]}', b'{"scores": ["1", 1]}'),
    *(b'{"scores": [1e999, 1]}', b'{"scores": [' + b"9" * 5000 + b", 1]}", b'{"scores": [[1], [2]]}', b"[" * 200_000),
    *(
        b"\xff\xfe\x00",
        b"<html>busy</html>",
        b'{"scores": {"0": 1, "1": 2}}',
        b'{"scores": [1, 2]',
        b"\x1f\x8b\x08broken",
    ),
]
ANSWERS = {
    **{f"answers {body[:24]!r}": HEAD % len(body) + body for body in BODIES},
    "breaks off": HEAD % 100 + b'{"scores": [1, ',
    "no words": b"",
    "no HTTP": b"\x00\x01\x02\r\n\r\n",
    "a bad length": b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n{}",
    "a huge header": b"HTTP/1.1 200 OK\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
    "many headers": b"HTTP/1.1 200 OK\r\n" + b"X: a\r\n" * 500 + b"\r\n",
    "not found": b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
    "broken": b"HTTP/1.1 500 Error\r\nContent-Length: 0\r\nRetry-After: 1e9\r\n\r\n",
    "elsewhere": b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\nContent-Length: 0\r\n\r\n",
    "a bad chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}",
    "no gzip": b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}",
    "another charset": b"HTTP/1.1 200 OK\r\nContent-Type: application/json; charset=x\r\nContent-Length: 2\r\n\r\n{}",
}


def batch() -> RewardBatch:
    return RewardBatch(
        ["p", "q"],
        ["abc", "de"],
        prompt_ids=[[1], [2]],
        completion_ids=[[3], [4]],
        columns={"word": ["a", "b"]},
        rows=[5, 6],
    )


def outcome(score: Callable[[RewardBatch], list[float]], expected: list[float] | None) -> tuple[str, str]:
    """Of scoring one batch, which must come back unchanged. expected: the scores; None: there are none."""
    given, begin = batch(), time.monotonic()
    try:
        found = score(given)
        ended = "exact" if found == expected else "wrong", f"scores {found}"
    except AlignError as error:
        ended = "refused" if expected is None and str(error).isprintable() else "wrong", f"{error!r}"
    except Exception as error:  # a function's own error ends the run with its own traceback, and names the reward
        notes = getattr(error, "__notes__", [])
        named = any("raised by the reward function" in note for note in notes)
        ended = "raised" if named and expected is None else "wrong", traceback.format_exc()[-1500:]
    except BaseException:
        ended = "wrong", traceback.format_exc()[-1500:]
    if given != batch():
        return "wrong", "the batch was changed"
    return ended if time.monotonic() - begin < PATIENCE else ("wrong", "it took too long")


@contextmanager
def server(answer: bytes):
    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            asked = b""
            while not asked.endswith(b"}}"):  # what is not read when it closes would reset the connection
                part = self.request.recv(65536)
                if not part:
                    return
                asked += part
            self.request.sendall(answer)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads, block_on_close = True, False

    made = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{made.server_address[1]}/score"
    finally:
        made.shutdown()
        made.server_close()


def run(tally: Tally, folder: Path, data: Path, seed: int, number: int, until: float) -> None:
    import os

    os.environ["NO_PROXY"] = "127.0.0.1"
    folder.mkdir(parents=True)
    functions = [*((name, f, None) for name, f in FUNCTIONS.items()), *((name, *pair) for name, pair in TRUE.items())]
    for name, function, expected in functions:
        for how, options in {"": {}, " in threads": {"batch_size": 2, "concurrency": 2}}.items():
            if name == "blocks" and how:
                continue
            if (
                name == "busy" and how
            ):  # a regular expression lets no other thread run: the limits are in docs/rewards.md
                continue
            reward = RuleReward(function, name="hostile", timeout=1.0, **options)
            tally.add(
                "hostile rewards",
                *_named(name + how, outcome(lambda b, r=reward: r.score(b).scores.tolist(), expected)),
            )
    for name, answer in ANSWERS.items():
        with server(answer) as url:
            reward = RemoteReward(url, retries=1, backoff=0.01, timeout=2.0)
            tally.add("hostile servers", *_named(name, outcome(lambda b, r=reward: r.score(b).scores.tolist(), None)))
    body = json.dumps({"scores": [1, 2.5]}).encode()
    with server(HEAD % len(body) + body) as url:
        reward = RemoteReward(url)
        tally.add(
            "hostile servers", *_named("a true one", outcome(lambda b: reward.score(b).scores.tolist(), [1.0, 2.5]))
        )


def _named(name: str, ended: tuple[str, str]) -> tuple[str, str]:
    return ended[0], f"{name}: {ended[1]}"
