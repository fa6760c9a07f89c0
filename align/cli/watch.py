"""`align watch RUN`: a live page of a run, on this machine alone."""

import argparse
import json
import secrets
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from align.errors import AlignError, ConfigError

HELP = "a live page of a run, on this machine: curves, constraints, completions, phase times"
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="RUN", help="the output folder of a run that trains, or has trained")
    parser.add_argument("--port", type=int, default=0, metavar="N", help="port on 127.0.0.1 [one that is free]")


def run(args: argparse.Namespace) -> int:
    server = make_server(args.folder, args.port)
    print(f"watching {args.folder}: {server.address} (Ctrl-C ends it)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print("\nno longer watching; the run goes on")
    finally:
        server.server_close()
    return 0


class Server(ThreadingHTTPServer):
    daemon_threads = True
    address: str  # with the token that other users of this machine do not know


def make_server(run: str | Path, port: int = 0) -> Server:
    """A server on 127.0.0.1, not yet serving. ConfigError without such a folder, or with a port that is taken."""
    folder = Path(run)
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {str(folder)!r}: give the output folder of a run")
    if not 0 <= port <= 65535:
        raise ConfigError(f"there is no port {port}: ports are 1 to 65535, and 0 is one that is free")
    token, live = secrets.token_urlsafe(16), Live(folder)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            address = urlsplit(self.path)
            asked = {key: values[0] for key, values in parse_qs(address.query).items()}
            given = asked.get("token", "")
            host = self.headers.get("Host", "").rpartition(":")[0]
            # Another site's name that resolves to this machine must not read the page either.
            if not secrets.compare_digest(given.encode(), token.encode()) or host not in ("127.0.0.1", "localhost"):
                self.answer(403, "text/plain", "open the whole address that align watch has printed")
            elif address.path == "/":
                self.answer(200, "text/html", _page(folder.absolute().name))
            elif address.path == "/state.json":
                self.answer(200, "application/json", live.state(asked.get("have")))
            elif address.path == "/samples.json":
                self.answer(200, "application/json", live.samples(asked.get("prompt", "")))
            else:
                self.answer(404, "text/plain", "there is /, /state.json and /samples.json")

        def answer(self, status: int, kind: str, body: str) -> None:
            data = body.encode()
            self.send_response(status)
            for name, value in (
                ("Content-Type", f"{kind}; charset=utf-8"), ("Content-Length", str(len(data))),
                ("Content-Security-Policy", POLICY), ("X-Content-Type-Options", "nosniff"),
                ("Cache-Control", "no-store"), ("Referrer-Policy", "no-referrer"),
            ):  # fmt: skip
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args) -> None:
            """Every poll would be a line."""

    try:
        server = Server(("127.0.0.1", port), Handler)
    except OSError as error:
        raise ConfigError(f"cannot listen on port {port}: {error.strerror}; leave --port out for a free one") from error
    server.address = f"http://127.0.0.1:{server.server_address[1]}/?token={token}"
    return server


def _page(name: str) -> str:
    from align.evaluation.report import page_text

    return page_text("watch.html.j2", name=name)


class Live:
    """What the page asks for, as JSON: all its tabs share one reading of the run's files."""

    def __init__(self, folder: Path):
        from align.evaluation.watch import Watch

        self.watch = Watch(folder)
        self.lock = threading.Lock()
        self.told: tuple[int, str] | None = None  # the last state, and of which changes

    def state(self, have: str | None) -> str:
        """The state of the run, as of `version`; no more than that where the page has it already."""
        with self.lock:
            try:
                self.watch.update()
            except (AlignError, OSError) as error:  # a file is damaged, or cannot be read: the page says which
                return json.dumps({"error": str(error)})
            version = self.watch.changes
            if have == str(version):
                return json.dumps({"version": version, "unchanged": True})
            if self.told is None or self.told[0] != version:
                self.told = version, json.dumps({**self.watch.state(), "version": version}, allow_nan=False)
            return self.told[1]

    def samples(self, prompt: str) -> str:
        """The answers to one prompt, by its place, at every evaluation."""
        with self.lock:
            samples = list(self.watch.samples.values())
        found = samples[int(prompt)] if prompt.isdecimal() and int(prompt) < len(samples) else []
        return json.dumps(found, allow_nan=False)
