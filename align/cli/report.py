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

    if Path(args.output).is_dir():
        raise ConfigError(f"--output {args.output} is a folder: name the page's file, such as {args.output}/runs.html")
    folders: dict[str, Path] = {}
    for path in map(Path, args.runs):
        if path.resolve() in [other.resolve() for other in folders.values()]:
            raise ConfigError(f"{path} is given twice")
        name = next(name for name in (path.absolute().name, str(path), str(path.resolve())) if name not in folders)
        folders[name] = path
    print(write_runs_report(args.output, folders))
    return 0
