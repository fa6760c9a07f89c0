"""A line of a report."""

import contextlib
import json
import logging
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from align.errors import AlignError

logger = logging.getLogger(__name__)


@dataclass
class Line:
    """state: passed, failed, note (nothing to pass: what is used) or skipped (with why). remedy: of what failed."""

    what: str
    state: str
    found: str = ""
    remedy: str = ""

    def shown(self) -> str:
        remedy = f"\n{'':8}-> {self.remedy}" if self.remedy else ""
        return f"{self.state:7} {self.what}: {self.found}{remedy}"


def attempt(what: str, stage: Callable[[], str | Line], remedy: str) -> Line:
    """The line of a stage: what it returns (a text is what was found), or the error that came out of it."""
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what trainers print is no line of the report
            found = stage()
    except AlignError as error:
        return Line(what, "failed", " ".join(str(error).split()), remedy)
    except Exception as error:  # what is broken on a machine raises anything, and the other lines are wanted too
        logger.debug("%s", traceback.format_exc())
        return Line(what, "failed", " ".join(f"{type(error).__name__}: {error}".split())[:400], remedy)
    return found if isinstance(found, Line) else Line(what, "passed", found)


def report(lines: Iterable[Line], as_json: bool) -> int:
    """Print the lines, each when it is known, or all as one JSON object. Returns the exit status: 1 if one failed."""
    seen = []
    for line in lines:
        seen.append(line)
        if not as_json:
            print(line.shown(), flush=True)
    failed = [line for line in seen if line.state == "failed"]
    if as_json:
        print(json.dumps({"passed": not failed, "lines": [vars(line) for line in seen]}, indent=1))
    else:
        print(f"{len(failed)} of {len(seen)} lines failed" if failed else f"all {len(seen)} lines passed")
    return 1 if failed else 0
