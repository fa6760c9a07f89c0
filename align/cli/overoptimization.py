"""`align overoptimization`: the proxy and gold curves of training runs, from their evaluation files."""

import argparse
import time
from pathlib import Path

from align.cli.option_types import add_seed
from align.errors import ConfigError, DataError

HELP = "curves, fits and a report of runs: proxy and gold score against KL"
INTRO = (
    "Each run optimises a proxy reward; a gold reward, which the training never sees, judges the same completions. The "
    "proxy is over-optimised from where the gold score falls while the proxy score still rises."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or its overoptimization.jsonl")
    parser.add_argument("--names", nargs="+", metavar="NAME", help="names of the runs, in order [their own]")
    parser.add_argument("--output_dir", default="outputs/overoptimization", metavar="DIR", help="[%(default)s]")
    parser.add_argument("--title", default="Over-optimisation of training runs", help="title of the report")
    add_seed(parser, "of the bootstrap")


def run(args: argparse.Namespace) -> int:
    from align.evaluation.console import print_summary
    from align.evaluation.masks import read_content
    from align.evaluation.records import Run, read_run
    from align.evaluation.report import write_outputs
    from align.evaluation.summary import build_summary

    if args.names and len(args.names) != len(args.runs):
        raise ConfigError(f"--names gives {len(args.names)} names for {len(args.runs)} runs")
    started = time.perf_counter()
    runs: dict[str, Run] = {}
    masks: dict[str, dict] = {}
    for number, path in enumerate(args.runs):
        found = read_run(path)
        name = args.names[number] if args.names else found.name
        if name in runs:
            raise DataError(f"{path} and {runs[name].path} are both named {name!r}: tell them apart with --names")
        runs[name] = found
        if content := read_content(Path(path)):
            masks[name] = content
    read = time.perf_counter()
    setup = {"runs": [str(Path(path)) for path in args.runs], "bootstrap seed": args.seed}
    summary = build_summary(runs=runs, setup=setup, masks=masks, seed=args.seed)
    summary["phases"] = {"read": read - started, "curves and fits": time.perf_counter() - read}
    paths = write_outputs(args.output_dir, summary, title=args.title, intro=INTRO)
    print_summary(summary, paths)
    return 0
