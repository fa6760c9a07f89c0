"""`align schema METHOD`: the JSON schema of a method's configuration files, for editors."""

import argparse
import json

from align.methods import METHODS

HELP = "the JSON schema of a method's config files, for editors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("method", choices=METHODS, metavar="METHOD", help=", ".join(METHODS))


def run(args: argparse.Namespace) -> int:
    from align.config.options import json_schema

    print(json.dumps(json_schema(args.method), indent=2, ensure_ascii=False))
    return 0
