"""`align front`: the fronts of sweeps, scored and drawn: every policy by every objective, and its KL."""

import argparse
import logging
import math
import time
from pathlib import Path

from align.cli.option_types import add_seed, at_least
from align.errors import ConfigError

logger = logging.getLogger(__name__)

HELP = "Pareto fronts: score every policy of one or more sweeps by several rewards, and draw them"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folder of a sweep, or of one policy")
    add = parser.add_argument
    add("--prompts", required=True, metavar="DATA", help="a dataset with prompts: a file, a folder or a hub name")
    add("--split", default="train", help="its split [train]")
    add("--num_prompts", type=at_least(1), default=128, metavar="N", help="the first so many prompts [128]")
    add(
        "--rewards",
        nargs="+",
        required=True,
        metavar="REWARD",
        help="one per objective, at least two, to be maximised: file.py:function, a classifier's folder, '{type: ...}'",
    )
    add("--names", nargs="+", metavar="NAME", help="names of the runs, in order [their folders']")
    add("--reference", metavar="MODEL", help="the policy that training started from [what the sweeps say]")
    add("--n", type=at_least(1), default=4, metavar="N", help="completions per prompt [4]")
    add("--max_prompt_length", type=at_least(1), default=512, metavar="N", help="longer prompts are an error [512]")
    add("--max_completion_length", type=at_least(1), default=256, metavar="N", help="[256]")
    add("--temperature", type=float, default=1.0, metavar="T", help="[1.0]")
    add("--backend", default="auto", metavar="NAME", help="vllm, transformers or file.py:Class [auto]")
    add(
        "--reference_point",
        nargs="+",
        type=float,
        metavar="R",
        help="hypervolumes are measured from here, one number per reward [the worst mean of all policies]",
    )
    add("--output_dir", default="outputs/front", metavar="DIR", help="[%(default)s]")
    add_seed(parser, "of drawing and of the bootstrap")


def run(args: argparse.Namespace) -> int:
    from align.data import load_rows, tokenize_prompts
    from align.evaluation.front_scores import Sampling, score_fronts, summarise
    from align.evaluation.scoring import build_rewards
    from align.modeling.load import load_tokenizer
    from align.rollout.make import check_backend

    check_backend(args.backend)
    if args.temperature <= 0:
        raise ConfigError(f"a policy is judged by draws from it: --temperature must be above 0, not {args.temperature}")
    fronts = read_fronts(args)
    reference = next(iter(fronts.values())).reference
    tokenizer = load_tokenizer(reference)
    rewards = build_rewards(args.rewards, None, gold_name="", tokenizer=tokenizer)
    if len(rewards) < 2:
        raise ConfigError(f"a front has at least two objectives, and --rewards names only {', '.join(rewards)}")
    if args.reference_point is not None and len(args.reference_point) != len(rewards):
        raise ConfigError(f"--reference_point gives {len(args.reference_point)} numbers for {len(rewards)} rewards")
    if not all(map(math.isfinite, args.reference_point or ())):
        raise ConfigError(f"--reference_point: finite numbers, got {args.reference_point}")
    prompts = load_rows(args.prompts, args.split)
    prompts = tokenize_prompts(
        prompts.select(range(min(args.num_prompts, len(prompts)))),
        tokenizer,
        max_prompt_length=args.max_prompt_length,
        source=args.prompts,
    )
    started = time.perf_counter()
    sampling = Sampling(args.n, args.max_completion_length, args.temperature, args.backend, args.seed)
    found = score_fronts(fronts, prompts, rewards, tokenizer, sampling)
    summary = summarise(fronts, found, list(rewards), reference_point=args.reference_point, seed=args.seed)
    summary["setup"] = {
        "reference": reference,
        "prompts": args.prompts,
        "completions per prompt": args.n,
        "temperature": args.temperature,
        "max_completion_length": args.max_completion_length,
        "seed": args.seed,
        "seconds": time.perf_counter() - started,
    }
    write(Path(args.output_dir), summary, found)
    print_fronts(summary)
    print(f"wrote front.html, scores.json, front.png, front.svg and completions.jsonl in {args.output_dir}")
    return 0


def read_fronts(args: argparse.Namespace) -> dict:
    """The runs' fronts by name, all with the same reference."""
    from align.evaluation.front_scores import REFERENCE, as_front
    from align.modeling.adapters import named_base

    names = args.names or [Path(run).resolve().name for run in args.runs]
    if len(names) != len(args.runs):
        raise ConfigError(f"--names gives {len(names)} names for {len(args.runs)} runs")
    if len(set(names)) != len(names) or REFERENCE in names:
        raise ConfigError(f"the runs are named {names}: tell them apart with --names ({REFERENCE!r} is taken)")
    fronts = {name: as_front(run) for name, run in zip(names, args.runs, strict=True)}
    references = [args.reference] if args.reference else [f.reference for f in fronts.values() if f.reference]
    known = {named_base(str(reference)) for reference in references}
    if len(known) != 1:
        found = f"they started from {', '.join(sorted(known))}" if known else "none says which policy it started from"
        raise ConfigError(f"fronts are compared from one reference policy: {found}. Name it with --reference")
    for front in fronts.values():
        front.reference = next(iter(known))
    in_one_order(list(fronts.values()))
    return fronts


def in_one_order(fronts: list) -> None:
    """Bring the weights of all points into the order of the first front that has some, where all are of the same
    objectives: the pictures and the table tell points by their first weight."""
    points = [point for front in fronts for point in front.points if point.weights]
    if len({frozenset(point.weights) for point in points}) == 1:
        for point in points[1:]:
            point.weights = {name: point.weights[name] for name in points[0].weights}


def write(folder: Path, summary: dict, found: dict) -> None:
    """scores.json (the summary), the figure, the page, and one completion per prompt of every policy to read."""
    import json

    from align.evaluation.front_page import write_page
    from align.evaluation.front_plots import plot_fronts
    from align.evaluation.plots import save_figure

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scores.json").write_text(json.dumps(summary, indent=2) + "\n")
    save_figure(plot_fronts(summary), folder / "front")
    write_page(folder / "front.html", summary)
    with open(folder / "completions.jsonl", "w", encoding="utf-8") as file:
        for run, policies in found.items():
            points = [p["name"] for p in summary["runs"][run]["points"]] if run in summary["runs"] else [run]
            for point, policy in zip(points, policies, strict=True):
                for sample in policy.samples:
                    file.write(json.dumps({"run": run, "point": point, **sample}, ensure_ascii=False) + "\n")


def print_fronts(summary: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{summary['prompts']} prompts; * not dominated within its run; 95 % intervals over prompts")
    points = [point for run in summary["runs"].values() for point in run["points"]]
    names = {" ".join(point["weights"]) for point in points if point["weights"]}
    of = f"weights\n{' '.join(names)}" if len(names) == 1 else "weights"
    columns = ["run", of, *summary["objectives"], "KL"]
    for name in columns:
        table.add_column(name, justify="left" if name in ("run", of) else "right")

    def value(entry: dict) -> str:
        return f"{entry['mean']:.3f} ±{(entry['high'] - entry['low']) / 2:.3f}"

    def shown(name: str, weight: float) -> str:
        return f"{weight:.3g}" if len(names) == 1 else f"{name} {weight:.3g}"

    def row(name: str, weights: str, entry: dict) -> None:
        table.add_row(name, weights, *(value(v) for v in entry["scores"].values()), value(entry["kl"]))

    row("reference", "", summary["reference"])
    for name, run in summary["runs"].items():
        for point in run["points"]:
            weights = " ".join(shown(*one) for one in point["weights"].items()) or point["name"]
            row(name + (" (soup)" if point["kind"] == "soup" else ""), weights + " *" * point["non_dominated"], point)
    console = Console()
    console.print(table)
    corner = ", ".join(f"{x:.3f}" for x in summary["reference_point"])
    for name, run in summary["runs"].items():
        volume = run["hypervolume"]
        spread = f"[{volume['low']:.3f}, {volume['high']:.3f}]"
        console.print(f"{name}: hypervolume {volume['mean']:.3f} {spread} above ({corner})", markup=False)
