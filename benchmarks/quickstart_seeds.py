r"""The quickstart over seeds: is the single proxy over-optimised, and do the ensembles end above it?

    python benchmarks/quickstart_seeds.py --backend transformers [--seeds 0 1 2 3 4] [--folder DIR]
    python benchmarks/quickstart_seeds.py --backend vllm --folder runs/quickstart_seeds_vllm \
        --output benchmarks/results/quickstart_seeds_vllm.json

Runs `align quickstart --seed S` for each seed, one after the other (a run that is there already is kept), and reads
what it left. Then a rival that the quickstart does not have: one reward model of the same pairs of all annotators, as
many epochs of them, and a ReMax run against it. Per run: the gold score at the start, at its peak and at the end with
the 95 % interval over the held-out prompts, and the verdict of the report. `above` says of an ensemble whether the
interval of its end lies wholly above that of the single proxy's end. FILE holds the seeds of its settings; others are
refused.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from rich.console import Console

from align.evaluation.records import read_run
from align.evaluation.summary import build_summary, package_versions, read_summary
from align.quickstart import phases
from align.quickstart.parts import RUNS
from align.quickstart.progress import PhaseHandle, PhaseProgress
from align.quickstart.settings import FULL, Settings
from align.quickstart.workers import Phase, run_phases
from align.quickstart.workspace import Workspace

RESULT = Path(__file__).parent / "results" / "quickstart_seeds.json"
SINGLE, *ENSEMBLES = RUNS
ALL_PAIRS = "one of all pairs"


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
    found[ALL_PAIRS], accuracy = rival(folder, replace(FULL, backend=backend), seed)
    return {"runs": found, "accuracy_of_members": accuracies, "accuracy_of_all_pairs": accuracy}


def rival(folder: Path, settings: Settings, seed: int) -> tuple[dict, float]:
    """The numbers of a run against one reward model of all pairs of the quickstart in `folder`, and its accuracy."""
    space = Workspace(folder / "all_pairs", settings.fingerprint(seed))
    for made in ("data", "sft"):
        if not space.path(made).exists():
            space.path(made).symlink_to(Path("..") / made)
    model, run = "reward model of all pairs", f"ReMax: {ALL_PAIRS}"
    plan = {model: Phase(reward_model_of_all, (), 40.0), run: Phase(partial(phases.remax, SINGLE), (model,), 40.0)}
    with PhaseProgress({name: phase.expected for name, phase in plan.items()}, Console(stderr=True)) as progress:
        run_phases(plan, space, (settings, seed), progress, space.folder / "phases.log", settings.backend)
    summary = build_summary(runs={ALL_PAIRS: read_run(space.path("remax", SINGLE.replace(" ", "_")))}, seed=seed)
    return numbers(summary["runs"][ALL_PAIRS]), round(space.state["phases"][model]["result"]["accuracy"], 3)


def reward_model_of_all(space: Workspace, settings: Settings, seed: int, handle: PhaseHandle) -> dict:
    return phases.reward_model(0, space, replace(settings, own_pairs=False), seed, handle)


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
    names = [*RUNS, ALL_PAIRS]
    lines = [f"| seed | start | {' | '.join(names)} |", f"|---|---|{'---|' * len(names)}"]
    for seed, found in seeds.items():
        runs = found["runs"]
        cells = [
            "{peak:.2f}, {end:.2f} [{0:.2f}, {1:.2f}]".format(*runs[name]["end_interval"], **runs[name])
            for name in names
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
    report["versions"] = package_versions()
    for seed in args.seeds:
        found = {**report["seeds"], str(seed): run_seed(args.folder / f"seed_{seed}", seed, args.backend)}
        report["seeds"] = {seed: found[seed] for seed in sorted(found, key=int)}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report["seeds"]))


if __name__ == "__main__":
    main()
