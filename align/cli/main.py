"""The `align` command: one sub-command per training method, and the tools around them.

Modules of sub-commands have `HELP`, `add_arguments(parser)` and `run(args) -> exit status`, and import what is heavy
inside `run`, so that `align --help` answers at once.
"""

import argparse
import importlib
import os
import select
import sys
import time
import traceback

from align.cli import terminal
from align.config.secrets import masked_text
from align.distributed.disk import reason
from align.errors import AlignError, ConfigError
from align.methods import METHODS

TOOLS = {
    "configs": "align.cli.configs",
    "schema": "align.cli.schema",
    "check": "align.cli.check",
    "doctor": "align.cli.doctor",
    "quickstart": "align.cli.quickstart",
    "chat": "align.cli.chat",
    "generate": "align.cli.generate",
    "compare": "align.cli.compare",
    "export": "align.cli.export",
    "watch": "align.cli.watch",
    "report": "align.cli.report",
    "data": "align.cli.data",
    "masks": "align.cli.masks",
    "reward-eval": "align.cli.reward_eval",
    "bon": "align.cli.bon",
    "overoptimization": "align.cli.overoptimization",
    "proxy-points": "align.cli.proxy_points",
    "front": "align.cli.front",
}

OUTPUTS = ("output_dir", "output", "to")
"""The options of tools that name what is written."""

AFTER_FIRST = 15.0
"""Seconds that the other processes of a launch keep an error back. The launcher ends them as soon as the first one has
left with its own, mostly the same: so it is printed once."""


def build_parser() -> argparse.ArgumentParser:
    """The parser of all sub-commands. Parsed arguments carry `run`, a function of (arguments, remaining tokens)."""
    from align.cli import launch, serve, train

    parser = argparse.ArgumentParser(
        prog="align",
        description="Align language models with preferences and rewards; see when a reward stops being trustworthy.",
        epilog="`align COMMAND --help` lists the options of a command.",
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=20, width=110),
    )
    parser.add_argument("--version", action="store_true", help="print the version and stop")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    for name, method in METHODS.items():
        # --help of a method lists the fields of its config: it is printed by `train.run`, which may import them
        sub = commands.add_parser(name, help=method.help, add_help=False, allow_abbrev=False)
        train.add_arguments(sub)
        sub.set_defaults(run=train.run, parser=sub)
    for name, module in (("launch", launch), ("serve", serve)):
        sub = commands.add_parser(name, help=module.HELP, description=module.DESCRIPTION, allow_abbrev=False)
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    for name, path in TOOLS.items():
        module = importlib.import_module(path)
        sub = commands.add_parser(name, help=module.HELP, description=module.HELP, allow_abbrev=False)
        module.add_arguments(sub)
        sub.set_defaults(run=_no_further_tokens(module.run, sub))
    for sub in commands.choices.values():
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error (also ALIGN_DEBUG=1)")
    return parser


def _no_further_tokens(run, parser: argparse.ArgumentParser):
    def checked(args: argparse.Namespace, extra: list[str]) -> int:
        if extra:
            parser.error(f"unrecognized arguments: {' '.join(extra)}{_repeat(parser, args, extra)}")
        output = next((found for name in OUTPUTS if isinstance(found := vars(args).get(name), str)), None)
        try:
            return run(args)
        except OSError as error:
            why = reason(error, output) if output is not None else None
            if why is None or not _in_the_way(error.filename, output):
                raise
            raise ConfigError(
                f"{error.filename} cannot be written: {why}. Name another place for the output"
            ) from error

    return checked


def _repeat(parser: argparse.ArgumentParser, args: argparse.Namespace, extra: list[str]) -> str:
    """What to write if these are more values for an option that takes one at a time."""
    given = [
        a.option_strings[0]
        for a in parser._actions
        if isinstance(a.default, list) and not a.nargs and vars(args)[a.dest]
    ]
    if not given or extra[0].startswith("-"):
        return ""
    return f" ({' and '.join(given)} take one value each time: {given[0]} A {given[0]} B)"


def _in_the_way(failed: str | None, output: str | None) -> bool:
    """Whether a path is in the output, or above it."""
    if not failed or not output:
        return False
    failed, output = os.path.abspath(failed), os.path.abspath(output)
    return failed.startswith(output) or output.startswith(failed)


def main(argv: list[str] | None = None) -> int:
    """Run the command. Exit status: 0 done, 2 a mistake the user can fix (one line on stderr), 130 interrupted,
    141 nobody reads its output."""
    parser = build_parser()
    args, extra = parser.parse_known_args(argv)
    if args.version:
        import align

        print(f"align {align.__version__}")
        return 0
    if args.command is None:
        parser.print_help()
        return 0
    # vLLM on a CPU generates up to ten times slower when idle OpenMP threads spin; read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    terminal.set_up_logging()
    try:
        with terminal.each_warning_once():
            return args.run(args, extra)
    except AlignError as error:
        if args.debug or os.environ.get("ALIGN_DEBUG") == "1":
            traceback.print_exc()
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(AFTER_FIRST)
        print(f"align: error: {masked_text(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("align: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        if not _output_is_closed():
            raise
        print("align: stopped, because its output is read no more", file=sys.stderr)
        return 141  # as the shell says it of SIGPIPE


def _output_is_closed() -> bool:
    """Whether what reads the standard output has ended, as in `align ... | head`. If so, nothing goes there again."""
    output = sys.stdout.fileno()
    watch = select.poll()
    watch.register(output, 0)  # POLLERR is told unasked
    closed = any(events & select.POLLERR for _, events in watch.poll(0))
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)  # Python flushes it once more as it ends
    return closed


if __name__ == "__main__":
    sys.exit(main())
