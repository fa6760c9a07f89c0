"""`align doctor`: what is installed, what a run will use, and whether each part works on this machine."""

import argparse
from contextlib import nullcontext

HELP = "what is installed, what a run would use, and a self-check of each part, with the remedy of what fails"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="MODEL", help="also say what this model allows: shared prefixes, attention")
    parser.add_argument(
        "--backend",
        metavar="NAME",
        help="check this rollout engine [what `auto` takes on a GPU; transformers on a CPU, where vLLM starts slowly]",
    )
    parser.add_argument("--no_self_check", action="store_true", help="look only: no step, no rollout, no process")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Exit status: 0 if every line passed, 1 if one failed."""
    from align.cli.terminal import errors_only
    from align.doctor.lines import report
    from align.doctor.machine import lines

    with errors_only() if args.json else nullcontext():
        return report(lines(args.model, args.backend, self_check=not args.no_self_check), args.json)
