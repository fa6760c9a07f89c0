"""`align check CONFIG`: the invariants that training rests on, on the user's own model, data and rewards."""

import argparse

HELP = "what must hold of a config's run, tried in small on its own model and data, each with its bound"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a run's file, or a ready config's name")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="options of the run, as its command takes them"
    )
    parser.add_argument(
        "--rows", type=int, default=16, metavar="N", help="rows of the training split that are used, from 8 [16]"
    )
    parser.add_argument(
        "--folder", metavar="DIR", help="where the short runs are written, and deleted [the system's temporary folder]"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Exit status: 0 if every line passed, 1 if one failed."""
    from align.cli.terminal import errors_only
    from align.doctor.invariants import lines
    from align.doctor.lines import report

    with errors_only():
        return report(lines(args.config, args.set, args.rows, args.folder), args.json)
