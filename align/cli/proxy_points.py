"""`align proxy-points`: the thresholds up to which the gold score rises, from runs that optimised one reward each."""

import argparse
from pathlib import Path

from align.cli.option_types import add_seed, at_least

HELP = "thresholds for constraints: up to where gold still rises with each proxy, from runs of one reward each"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or its overoptimization.jsonl")
    add = parser.add_argument
    add("--rewards", nargs="+", metavar="NAME", help="names of the rewards, at most three [all that the runs share]")
    add("--degree", type=at_least(1), default=4, metavar="N", help="total degree of the surface [4]; the paper has 10")
    add(
        "--mask_quantile",
        type=float,
        default=0.05,
        metavar="Q",
        help="leave out where points are less dense than around this share of the evaluations [0.05]",
    )
    add("--output_dir", default="outputs/proxy_points", metavar="DIR", help="[%(default)s]")
    add_seed(parser, "of the folds and the bootstrap")


def run(args: argparse.Namespace) -> int:
    from align.errors import ConfigError
    from align.evaluation.plots import save_figure
    from align.evaluation.proxy_point_plot import plot_proxy_point
    from align.evaluation.proxy_points import find_proxy_point
    from align.evaluation.records import read_run
    from align.evaluation.strict_json import write_json

    folders = [Path(path).resolve() for path in args.runs]
    for path, folder in zip(args.runs, folders, strict=True):
        if folders.count(folder) > 1:
            raise ConfigError(f"{path} is given twice: its evaluations would count twice")
    runs = [read_run(path) for path in args.runs]
    found = find_proxy_point(runs, args.rewards, degree=args.degree, mask_quantile=args.mask_quantile, seed=args.seed)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    summary = {**found.as_dict(), "runs": [str(run.path) for run in runs], "mask_quantile": args.mask_quantile}
    write_json(folder / "proxy_points.json", {**summary, "seed": args.seed})
    save_figure(plot_proxy_point(found), folder / "proxy_points")
    print("\n".join(describe(found)))
    print(f"wrote proxy_points.json, proxy_points.png and proxy_points.svg in {folder}")
    return 0


def describe(found) -> list[str]:
    """The point as lines of text, and as the section of a configuration."""
    lines = [
        f"gold over {', '.join(found.rewards)}: {len(found.visited)} evaluations, polynomial of degree {found.degree}, "
        f"ridge {found.ridge:.2g}, explains {100 * found.explained:.0f} % of the variance out of fold"
    ]
    for name, value, low, high in zip(found.rewards, found.point, found.low, found.high, strict=True):
        lines.append(f"  {name}: {value:.4g} [{low:.4g}, {high:.4g}]")
    lines.append(f"  gold there: {found.gold:.4g} (best evaluation: {found.visited_gold.max():.4g})")
    if found.border:
        lines.append(
            f"warning: the maximum lies at the border of what the runs visited, along {', '.join(found.border)}: gold "
            "may rise further. Train those runs longer, or from more seeds, before trusting this point"
        )
    lines.append("constraints:")
    for name, value in zip(found.rewards, found.point, strict=True):
        lines.append(f"  - {{reward: {name}, direction: at_least, threshold: {value:.4g}}}")
    return lines
