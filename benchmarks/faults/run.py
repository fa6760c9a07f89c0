"""The campaign of faults: what is killed, damaged, made up or refused ends exactly, or in one sentence.

    nice -n 10 python benchmarks/faults/run.py --seed 0 --minutes 75 [--output FILE] [--areas kills damage ...]
    python benchmarks/faults/run.py --short

Prints one table: tried, exact (as if nothing had happened), refused (one sentence of an `AlignError`, or a damaged
checkpoint passed over), raised (the own error of a user's reward function, with a note that names the reward), wrong
(all else: a traceback, a hang, other weights), and what was wrong, with what makes it again. Exit status 1 if anything
was. `--minutes` is shared by the areas; each stops at its number (150 kills, 800 damages, 10,000 configs, 10,000 rows).
FILE gets what an area found as soon as it ends, in the place of what it found before; those of other areas stay.
`--short` is the form of the tests, with a few of each, and without the kills of vLLM, FSDP2 and the quickstart.
"""

import argparse
import gc
import importlib
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
HERE = Path(__file__).resolve().parent
sys.path[0] = str(HERE.parents[1])  # not this folder, whose names are of a package

SHARES = {
    **{"configs": 0.1, "rows": 0.07, "rewards": 0.05, "disk": 0.04, "damage": 0.24, "kills": 0.3},
    **{"vllm": 0.06, "fsdp2": 0.06, "quickstart": 0.08},
}
NUMBERS = {
    **{"configs": 10_000, "rows": 10_000, "rewards": 10_000, "disk": 40, "damage": 800, "kills": 150},
    **{"vllm": 12, "fsdp2": 12, "quickstart": 4},
}
KILLED = ("vllm", "fsdp2", "quickstart")
SHORT = {"configs": 300, "rows": 400, "rewards": 10_000, "disk": 4, "damage": 24, "kills": 6}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=75.0)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--areas", nargs="+", choices=NUMBERS, help="[those of the form]")
    parser.add_argument("--folder", type=Path, help="work here and keep it [a temporary folder]")
    parser.add_argument("--output", type=Path, help="write the table as JSON")
    args = parser.parse_args()
    args.areas = args.areas or list(SHORT if args.short else NUMBERS)
    return args


def main() -> int:
    args = arguments()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="faults-"))
    folder.mkdir(exist_ok=True)
    folder.chmod(0o755)  # one area runs as another user, who must reach the folder that is closed to it
    os.environ["HF_DATASETS_CACHE"] = str(folder / "datasets")
    import datasets

    from benchmarks.faults import processes, world

    if set(args.areas) - {"configs", "rows", "rewards"}:
        processes.import_everything()
        gc.collect()
        gc.freeze()  # neither looked through by each child nor copied for it
    from benchmarks.faults.tally import Tally

    logging.disable(logging.WARNING)  # of rows that are left out, one by one
    datasets.disable_progress_bars()
    tallies = []
    made = processes.in_child(folder / "made", lambda: str(world.make(folder / "world", args.seed)))
    if made.value is None:
        raise SystemExit(f"the world cannot be made: {made}")
    shares = sum(SHARES[area] for area in args.areas)
    for area in args.areas:
        begin = time.monotonic()
        until = begin + (600 if args.short else 60 * args.minutes * SHARES[area] / shares)
        number = (SHORT if args.short else NUMBERS).get(area, 1)
        tally = Tally()
        tallies.append(tally)
        _area(area)(tally, folder / area, folder / "world", args.seed, number, until)
        seconds = time.monotonic() - begin
        print(f"{area}: {seconds:.0f} s", flush=True)
        if args.output:
            keep(args.output, area, {"seed": args.seed, "minutes": round(seconds / 60, 1), **tally.found()})
    together = Tally.together(tallies)
    print(together.table())
    print(*together.faults, sep="\n")
    if args.folder is None:
        shutil.rmtree(folder)
    return 1 if together.faults else 0


def keep(output: Path, area: str, found: dict) -> None:
    """Write what one area has found beside what others have."""
    before = json.loads(output.read_text()) if output.exists() else {}
    areas = {name: one for name, one in before.items() if name in NUMBERS} | {area: found}  # of an older form: nothing
    output.write_text(json.dumps(areas, indent=1) + "\n")


def _area(name: str):
    if name in KILLED:
        return partial(_area("kills"), which=name)
    return importlib.import_module(f"benchmarks.faults.{name}").run


if __name__ == "__main__":
    sys.exit(main())
