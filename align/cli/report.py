"""`align report RUN...`: one page about runs of any method."""

import argparse
from pathlib import Path

from align.errors import ConfigError

HELP = "a page about runs of any method: curves, settings that differ, versions, phase times, completions"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folders of runs")
    parser.add_argument("--output", default="outputs/runs.html", metavar="FILE", help="the page [%(default)s]")


def run(args: argparse.Namespace) -> int:
    from align.evaluation.runs_report import write_runs_report

    folders: dict[str, Path] = {}
    for path in map(Path, args.runs):
        name = path.absolute().name
        name = name if name not in folders else str(path)
        if name in folders:
            raise ConfigError(f"{path} is given twice")
        folders[name] = path
    print(write_runs_report(args.output, folders))
    return 0
