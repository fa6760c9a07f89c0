"""Pages opened in headless Chromium: what they print to the console, and what a script finds in them."""

import functools
import json
import re
import shutil
import subprocess
import threading
from html import unescape
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)")

FRAMES = """<!doctype html><body><script>
const pages = %s, look = %s, found = {};
async function ask() {
  for (const [name, width] of pages) {
    const frame = document.createElement("iframe");
    frame.style.width = width + "px"; frame.style.height = "2000px"; frame.src = name;
    await new Promise(done => { frame.onload = done; document.body.append(frame); });
    await new Promise(done => setTimeout(done, 100));
    const key = name + "@" + width;
    try { found[key] = frame.contentWindow.eval("(() => {" + look + "})()"); }
    catch (error) { found[key] = String(error); }
    frame.remove();
  }
  document.body.dataset.found = JSON.stringify(found);
}
ask();
</script></body>"""


def run_in(address: str, *, profile: Path, seconds: int = 4) -> tuple[str, list[str]]:
    """(the page's DOM once its scripts have run, messages of the console) of an address."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--user-data-dir={profile}"]
    command = [CHROMIUM, *options, f"--virtual-time-budget={1000 * seconds}", "--dump-dom", address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


def _answer(dom: str):
    found = re.search(r'data-found="([^"]*)"', dom)
    return json.loads(unescape(found[1])) if found else None


def ask(page: Path, script: str, folder: Path):
    """What `script`, a function body, returns in the page, and the console's messages."""
    asked = folder / "asked.html"
    call = f"const found = (() => {{{script}}})(); document.body.dataset.found = JSON.stringify(found);"
    asked.write_text(page.read_text().replace("</body>", f"<script>{call}</script></body>"))
    dom, console = run_in(asked.as_uri(), profile=folder / "profile")
    return _answer(dom), console


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args) -> None:
        """Every file would be a line."""


def ask_all(folder: Path, pages: list[tuple[str, int]], script: str, profile: Path):
    """What `script` returns in each page of a folder at a width in pixels, by "page@width", and the console's messages.
    One browser: every page is opened in a frame of the next, from a server on this machine."""
    (folder / "frames.html").write_text(FRAMES % (json.dumps(pages), json.dumps(script)))
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        address = f"http://127.0.0.1:{server.server_address[1]}/frames.html"
        dom, console = run_in(address, profile=profile, seconds=40)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    return _answer(dom), [line for line in console if "favicon" not in line]
