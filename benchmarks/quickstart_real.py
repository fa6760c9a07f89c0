"""What a finished `align quickstart --real` shows, as one file of numbers and texts.

    align quickstart --real --pairs FILE --output_dir FOLDER
    python benchmarks/quickstart_real.py FOLDER [--output FILE] [--image FILE]

FILE holds the settings, the reward models with their accuracy on held-out pairs, every evaluation of the ReMax runs and
every best-of-n curve with 95 % intervals over prompts, the verdicts, what the policy wrote to the first prompts before
training, at the gold peak and at the end, and the seconds of every phase. The image is the page's figure of proxy and
gold.
"""

import argparse
import json
import os
import shutil
from pathlib import Path

from align.evaluation.summary import read_summary

RESULT = Path(__file__).parent / "results" / "quickstart_real.json"
CURVE = ("proxy", "gold", "kl")
FILES = ("pairs", "model", "gold")  # settings that may be paths


def rounded(values: list, digits: int = 4) -> list:
    return [None if value is None else round(value, digits) for value in values]


def curve(entry: dict, axis: str) -> dict:
    """A run or a best-of-n curve: its axis, means and intervals, and the verdict."""
    found: dict = {axis: entry[axis], "prompts": entry["prompts"]}
    for name in (*CURVE, "length"):
        found |= {key: rounded(entry[key]) for key in (name, f"{name}_low", f"{name}_high") if key in entry}
    peak = entry["peak"]
    return {**found, "verdict": peak["verdict"], "peak": peak["peak"][axis]}


def numbers(folder: Path) -> dict:
    """Everything of the finished quickstart in `folder` that is recorded."""
    summary = read_summary(folder)
    settings = json.loads((folder / "phases.json").read_text())["settings"]
    names = {key: Path(settings[key]).name for key in FILES if settings[key]}
    return {
        "settings": {**settings, **names},
        "setup": summary["setup"],
        "versions": summary["versions"],
        "processors": os.cpu_count(),
        "seconds": {name: round(value) for name, value in summary["phases"].items()},
        "reward_models": summary["reward_models"],
        "runs": {name: curve(entry, "step") for name, entry in summary["runs"].items()},
        "best_of_n": {name: curve(entry, "n") for name, entry in summary["best_of_n"].items()},
        "end_gold_minus_single_proxy": {
            kind: found["end_gold_minus_base"] for kind, found in summary["comparisons"].items() if found
        },
        "texts": {name: entry["samples"] for name, entry in summary["runs"].items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--image", type=Path)
    args = parser.parse_args()
    args.output.write_text(json.dumps(numbers(args.folder), indent=1) + "\n")
    if args.image:
        shutil.copy(args.folder / "figures" / "runs_proxy_and_gold.png", args.image)


if __name__ == "__main__":
    main()
