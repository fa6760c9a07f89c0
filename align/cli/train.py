"""`align sft`, `align reward`, `align remax` ...: build what the resolved config names, train, save."""

import argparse
import logging

from align.methods import get_method

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command itself; the keys of the config are read by `align.config.resolve`."""
    parser.add_argument("--config", metavar="FILE", help="a YAML file with any of the keys below")
    parser.add_argument("--dry-run", action="store_true", help="show what would be trained on, and how, then stop")
    parser.add_argument("--help", "-h", action="store_true", help="show this and stop")


def run(args: argparse.Namespace, extra: list[str]) -> int:
    """Train the method `args.command`; `extra` holds the overrides of the command line."""
    if args.help:
        from align.config.help import format_help

        print(format_help(get_method(args.command), args.parser))
        return 0
    from align.config.resolve import resolve

    config = resolve(args.command, args.config, extra)
    if args.dry_run:
        from align.cli.dry_run import dry_run

        return dry_run(config)
    return 0
