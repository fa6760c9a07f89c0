"""Pages opened in headless Chromium: what they print to the console, and what a script finds in them."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)")


def run_in(address: str, *, profile: Path, seconds: int = 4) -> tuple[str, list[str]]:
    """(the page's DOM once its scripts have run, messages of the console) of an address."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--user-data-dir={profile}"]
    command = [CHROMIUM, *options, f"--virtual-time-budget={1000 * seconds}", "--dump-dom", address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


def ask(page: Path, script: str, folder: Path):
    """What `script`, a function body, returns in the page, and the console's messages."""
    asked = folder / "asked.html"
    call = f"const found = (() => {{{script}}})(); document.body.dataset.found = JSON.stringify(found);"
    asked.write_text(page.read_text().replace("</body>", f"<script>{call}</script></body>"))
    dom, console = run_in(asked.as_uri(), profile=folder / "profile")
    found = re.search(r'data-found="([^"]*)"', dom)
    return json.loads(unescape(found[1])) if found else None, console
