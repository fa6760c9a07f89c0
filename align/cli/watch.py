"""`align watch RUN`: a live page of a run, on this machine alone."""

import argparse
import json
import secrets
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
    token = secrets.token_urlsafe(16)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            address = urlsplit(self.path)
            given = parse_qs(address.query).get("token", [""])[0]
            host = self.headers.get("Host", "").rpartition(":")[0]
            # Another site's name that resolves to this machine must not read the page either.
            if not secrets.compare_digest(given.encode(), token.encode()) or host not in ("127.0.0.1", "localhost"):
                self.answer(403, "text/plain", "open the whole address that align watch has printed")
            elif address.path == "/":
                self.answer(200, "text/html", _page(folder.absolute().name))
            elif address.path == "/state.json":
                self.answer(200, "application/json", _state(folder))
            else:
                self.answer(404, "text/plain", "there is / and /state.json")

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


def _state(folder: Path) -> str:
    from align.evaluation.watch import snapshot

    try:
        return json.dumps(snapshot(folder))
    except AlignError as error:  # a file is damaged: the page says which
        return json.dumps({"error": str(error)})
