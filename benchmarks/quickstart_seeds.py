"""The quickstart over seeds: is the single proxy over-optimised, and do the ensembles end above it?

    python benchmarks/quickstart_seeds.py [--seeds 0 1 2 3 4] [--backend auto] [--folder DIR] [--output FILE]

Runs `align quickstart --seed S` for each seed, one after the other (a run that is there already is kept), and reads
what it left. Per run: the gold score at the start, at its peak and at the end with the 95 % interval over the held-out
prompts, and the verdict of the report. `above` says of an ensemble whether the interval of its end lies wholly above
that of the single proxy's end. FILE holds the seeds of its settings; others are refused.
"""

import argparse
import json
import platform
import subprocess
import sys
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

from align.evaluation.summary import read_summary
from align.quickstart.parts import RUNS
from align.quickstart.settings import FULL

RESULT = Path(__file__).parent / "results" / "quickstart_seeds.json"
SINGLE, *ENSEMBLES = RUNS


def run_seed(folder: Path, seed: int, backend: str) -> dict:
    """The numbers of one seed's quickstart, by run."""
    command = [sys.executable, "-m", "align", "quickstart", "--seed", str(seed), "--backend", backend]
    subprocess.run([*command, "--output_dir", str(folder)], check=True, stdout=sys.stderr)
    summary = read_summary(folder)
    found = {name: numbers(summary["runs"][name]) for name in RUNS}
    for name in ENSEMBLES:
        found[name]["above"] = found[name]["end_interval"][0] > found[SINGLE]["end_interval"][1]
        difference = summary["comparisons"]["runs"]["end_gold_minus_base"][name]
        found[name]["end_minus_single"] = {key: round(value, 3) for key, value in difference.items()}
    accuracies = [round(member["accuracy"], 3) for member in summary["reward_models"]]
    return {"runs": found, "accuracy_of_members": accuracies}


def numbers(run: dict) -> dict:
    places = {place: round(run["peak"][place]["gold"], 3) for place in ("start", "peak", "end")}
    return {
        **places,
        "end_interval": [round(run["gold_low"][-1], 3), round(run["gold_high"][-1], 3)],
        "peak_step": run["peak"]["peak"]["step"],
        "kl_at_end": round(run["kl"][-1], 2),
        "prompts": run["prompts"],
        "verdict": run["peak"]["verdict"],
    }


def table(seeds: dict[str, dict]) -> str:
    """The seeds as rows of Markdown: start, and peak and end with its interval for each run."""
    lines = [f"| seed | start | {' | '.join(RUNS)} |", f"|---|---|{'---|' * len(RUNS)}"]
    for seed, found in seeds.items():
        runs = found["runs"]
        cells = [
            "{peak:.2f}, {end:.2f} [{0:.2f}, {1:.2f}]".format(*run["end_interval"], **run) for run in runs.values()
        ]
        lines.append(f"| {seed} | {runs[SINGLE]['start']:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--backend", choices=("auto", "vllm", "transformers"), default="auto")
    parser.add_argument("--folder", type=Path, default=Path("runs/quickstart_seeds"))
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()

    settings = asdict(replace(FULL, backend=args.backend))
    report = json.loads(args.output.read_text()) if args.output.exists() else {"settings": settings, "seeds": {}}
    if report["settings"] != settings:
        parser.error(f"{args.output} holds seeds with other settings: give another --output")
    packages = ("torch", "transformers", "numpy")
    report["versions"] = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    for seed in args.seeds:
        found = {**report["seeds"], str(seed): run_seed(args.folder / f"seed_{seed}", seed, args.backend)}
        report["seeds"] = {seed: found[seed] for seed in sorted(found, key=int)}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report["seeds"]))


if __name__ == "__main__":
    main()
