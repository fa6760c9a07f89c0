"""What the numbers of a command's options may be, for argparse, and which of its options were set."""

import argparse
import json
from collections.abc import Callable
from typing import Any


def at_least(minimum: int) -> Callable[[str], int]:
    """The type of a whole number that is not below `minimum`."""

    def whole(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = minimum - 1
        if number < minimum:
            raise argparse.ArgumentTypeError(f"needs a whole number of {minimum} or more, not {text!r}")
        return number

    return whole


def mapping(text: str) -> dict[str, Any]:
    """The type of names and values, as JSON."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f'needs names and values as JSON, {{"enable_thinking": false}}, not {text!r}')
    return found


def add_template_kwargs(parser: argparse.ArgumentParser) -> None:
    """--chat_template_kwargs, as in training."""
    parser.add_argument(
        "--chat_template_kwargs",
        type=mapping,
        metavar="JSON",
        help="variables of the chat template, such as '{\"enable_thinking\": false}', as in training",
    )


def add_seed(parser: argparse.ArgumentParser | argparse._ArgumentGroup, of: str = "") -> None:
    """--seed: numpy takes none below 0. of: what it is the seed of, for the help."""
    parser.add_argument("--seed", type=at_least(0), default=0, metavar="N", help=f"{of} [0]".strip())


def set_options(args: argparse.Namespace, add: Callable, *, but: tuple[str, ...] = ()) -> list[str]:
    """The options of `add(parser)`, as they are written, whose values are not their defaults."""
    parser = argparse.ArgumentParser(add_help=False)
    add(parser)
    return [
        action.option_strings[0]
        for action in parser._actions
        if action.dest not in but and getattr(args, action.dest) != action.default
    ]
