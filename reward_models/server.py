"""A reward behind an address: what `{type: remote}` asks (docs/rewards.md, `align serve --reward`)."""

import hashlib
import json
import logging
import secrets
import signal
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from align.errors import AlignError, RewardError
from align.reward_models.base import Reward, RewardBatch

logger = logging.getLogger(__name__)

LARGEST = 1 << 28  # bytes of a request
SILENCE = 60  # seconds for which a connection may be silent
LISTS = ("prompts", "completions", "prompt_ids", "completion_ids", "ended")


class RewardServer(ThreadingHTTPServer):
    """Answers POST of a batch as JSON with `{"scores": [...]}`, one batch at a time, and GET with the reward's name.
    Without `Authorization: Bearer KEY` there is no answer but 401.

    What a reward refuses is 422 with its words, which a client does not ask for again; a failure of another kind 500.
    """

    daemon_threads = True

    def __init__(self, reward: Reward, key: str, host: str, port: int):
        self.reward, self.scoring = reward, threading.Lock()
        self.digest = hashlib.sha256(f"Bearer {key}".encode()).digest()
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), Answers)

    def answer(self, content: bytes) -> tuple[int, dict[str, Any]]:
        """Status and body."""
        try:
            batch = batch_of(json.loads(content))
        except (ValueError, TypeError, RecursionError) as error:
            return 422, {"error": f"the request is no batch to score: {error}"}
        try:
            with self.scoring:
                return 200, {"scores": self.reward.score(batch).scores.tolist()}
        except AlignError as error:
            logger.warning("reward %r refused a batch: %s", self.reward.name, error)
            return 422, {"error": str(error)}
        except Exception as error:  # the process lives on; whoever asked hears of it
            logger.exception("reward %r failed", self.reward.name)
            return 500, {"error": f"{type(error).__name__}: {error}"}


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = SILENCE
    server: RewardServer

    def do_GET(self) -> None:
        if self._allowed():
            self._send(200, {"reward": self.server.reward.name})

    def do_POST(self) -> None:
        if not self._allowed():
            return
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > LARGEST:
            self.close_connection = True  # what follows is not read
            self._send(413, {"error": f"a request has a Content-Length of at most {LARGEST} bytes"})
            return
        self._send(*self.server.answer(self.rfile.read(int(length))))

    def _allowed(self) -> bool:
        given = self.headers.get("Authorization", "").encode()
        if secrets.compare_digest(hashlib.sha256(given).digest(), self.server.digest):
            return True
        self.close_connection = True
        self._send(401, {"error": "this server needs its key"})
        return False

    def _send(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)


def batch_of(content: Any) -> RewardBatch:
    """Raises `ValueError` for what is none."""
    if not isinstance(content, dict):
        raise ValueError(f"expected an object, got {type(content).__name__}")
    given = {name: content[name] for name in LISTS if content.get(name) is not None}
    columns = content.get("columns") or {}
    if unknown := content.keys() - {*LISTS, "columns"}:
        raise ValueError(f"it has {', '.join(sorted(unknown))}; a batch has {', '.join(LISTS)} and columns")
    if not {"prompts", "completions"} <= given.keys() or not isinstance(columns, dict):
        raise ValueError("it needs the lists prompts and completions, and columns is an object of lists")
    lengths = {
        name: len(value) if isinstance(value, list) else None for name, value in [*given.items(), *columns.items()]
    }
    if len(set(lengths.values())) > 1 or None in lengths.values():
        raise ValueError(f"not all are lists of one length: {lengths}")
    return RewardBatch(**given, columns=columns)


def serve(reward: Reward, key: str, host: str, port: int, ready: str) -> None:
    """Until a signal ends it. ready: a line to print once it answers."""
    try:
        server = RewardServer(reward, key, host, port)
    except OSError as error:
        raise RewardError(f"cannot listen at {host}, port {port} ({error}): name another --port or --host") from error
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with server:
        print(ready, flush=True)
        server.serve_forever(poll_interval=0.1)
