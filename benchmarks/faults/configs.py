"""Configuration files that are damaged or made up, and odd options: each describes a run, or is an error in one line
that names the file and line, or the command line."""

import dataclasses
import math
import random
import re
import time
import traceback
from pathlib import Path
from typing import Any

import yaml

from align.config.arguments import option_classes
from align.config.options import options_of
from align.config.resolve import resolve, settings
from align.config.source import read_file, ready_configs
from align.errors import AlignError
from align.methods import METHODS
from benchmarks.faults.tally import Tally
from benchmarks.faults.world import draw

SECTIONS = ["rewards", "multipliers", "constraints", "extends", "rewards.0.path"]
ODD = [
    *("", "~", "true", "-1", "0", "1e309", ".inf", ".nan", "007", "1_000", "0x10", "[]", "{}", "[[]]", "{a: {b: c}}"),
    *("'x'", '"\\x00"', '"\\ud800"', "!!int x", "!!python/name:os.system", "!!binary x", "&a [*a]", "*nowhere", "é"),
    *("\x07", "${HOME}", "http://a:b@c", "- 1", "? x", "<<: 1", "|\n  a\n  b", "[1, 2", "{", "@", "%", "9" * 30),
]
VALUES: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        7,
        10**30,
        0.1,
        0.0,
        -0.5,
        1e-300,
        1e300,
        float("inf"),
        float("nan"),
        "",
        "x",
        "no",
    ),
    *(
        "auto",
        "1e3",
        "0.5",
        "12:00",
        "\u2028",
        "../x",
        [],
        [1],
        ["a", "b"],
        [None],
        {},
        {"a": 1},
        {"type": "rule"},
        [{}],
    ),
    *([{"type": "rule", "function": "align.data.toy:gold"}], {"type": "implicit", "path": "p"}, [[["x"]]], {1: 2}),
]


def damaged(rng: random.Random, text: str) -> bytes:
    """A ready config with some lines changed, added, cut or broken, or a byte that is none of UTF-8's."""
    lines = text.split("\n")
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(lines))
        key = lines[place].partition(":")[0]
        lines[place] = rng.choice(
            [
                f"{key}: {rng.choice(ODD)}",
                f"{key}x: 1",
                lines[place] + rng.choice(ODD),
                "  " * rng.randint(0, 3) + lines[place],
                lines[rng.randrange(len(lines))],
                lines[place][: rng.randint(0, 20)],
                f"{rng.choice(SECTIONS)}: {rng.choice(ODD)}",
            ]
        )
    content = "\n".join(lines).encode("utf-8", "surrogatepass")
    if rng.random() < 0.1:
        at = rng.randrange(len(content))
        content = content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :]
    return content


def made_up(rng: random.Random, method: str) -> bytes:
    """A run that could be, with up to three keys of the method set to any value."""
    content: dict[str, Any] = {"model_name_or_path": "m", "dataset_name": "d.jsonl", "output_dir": "o", "use_cpu": True}
    if METHODS[method].rewards:
        content["rewards"] = [{"type": "rule", "function": "align.data.toy:gold"}]
    keys = list(options_of(method))
    for _ in range(rng.randint(1, 3)):
        content[rng.choice(keys)] = rng.choice(VALUES)
    return yaml.safe_dump(content, allow_unicode=rng.random() < 0.5).encode("utf-8", "surrogatepass")


def one(rng: random.Random, path: Path, ready: dict[str, tuple[str, str]]) -> tuple[str, str]:
    """(outcome, what was wrong) of one file and command line."""
    tokens: list[str] = []
    if rng.random() < 0.5:
        method, text = rng.choice(sorted(ready.values()))
        path.write_bytes(damaged(rng, text))
    else:
        method = rng.choice(sorted(METHODS))
        path.write_bytes(made_up(rng, method))
    if rng.random() < 0.3:
        classes = option_classes(METHODS[method])
        field = rng.choice(list(dataclasses.fields(classes[rng.choice(list(classes))]))).name
        tokens = [f"--{field}={rng.choice(ODD)}"]
    what = f"align {method} {tokens} with {path.read_bytes()!r}"
    try:
        found = settings(resolve(method, str(path), tokens))
    except AlignError as error:
        return ("refused", "") if _is_placed(str(error), path.name) else ("wrong", f"{what}: {str(error)!r}")
    except Exception:  # a traceback is what is looked for
        return "wrong", f"{what}: {traceback.format_exc()[-1500:]}"
    endless = [key for key, value in found.items() if isinstance(value, float) and not math.isfinite(value)]
    return ("wrong", f"{what}: {endless} are no finite numbers") if endless else ("exact", "")


def _is_placed(message: str, name: str) -> bool:
    """One printable line that says where: the file or a line of it, a file that it extends, the command line."""
    where = re.search(rf"{re.escape(name)}(, line \d+|:| or on)|command line|base/\w+\.yaml", message)
    return bool(where) and message.isprintable()


def run(tally: Tally, folder: Path, data: Path, seed: int, number: int, until: float) -> None:
    folder.mkdir(parents=True)
    rng, path = draw(seed, "configs"), folder / "run.yaml"
    names = [name for name in ready_configs() if "/" not in name]
    ready = {name: (str(read_file(name)["method"].value), ready_configs()[name].read_text()) for name in names}
    for _ in range(number):
        if time.monotonic() > until:
            return
        tally.add("generated configs", *one(rng, path, ready))
