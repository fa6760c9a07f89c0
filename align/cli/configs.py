"""`align configs`: the ready configs, listed, shown whole, or copied to be changed."""

import argparse
import re
from pathlib import Path

HELP = "the ready configs: list them, show one whole, copy one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "`align configs` lists the ready configs; their names stand for their paths wherever a config file is named "
        "(align dpo --config dpo, extends: dpo). `align configs show NAME` prints all that one sets, with what it "
        "extends and where each value stands. `align configs copy NAME FILE` copies one to be changed."
    )
    parser.add_argument("action", nargs="?", choices=("list", "show", "copy"), default="list", help="[list]")
    parser.add_argument("name", nargs="?", metavar="NAME", help="a ready config; show takes files too")
    parser.add_argument("file", nargs="?", metavar="FILE", help="the copy, which must not exist yet [NAME.yaml]")


def run(args: argparse.Namespace) -> int:
    from align.config.source import find_config, read_file, ready_configs
    from align.errors import ConfigError

    if args.action == "list":
        for name, path in ready_configs().items():
            if "/" not in name:
                print(f"{name:<18} {describe(path)}")
        return 0
    if args.name is None:
        raise ConfigError(f"align configs {args.action} needs the name of a config; `align configs` lists them")
    path = find_config(args.name)
    if args.action == "show":
        print(shown(read_file(path)), end="")
        return 0
    target = Path(args.file or f"{path.stem}.yaml")
    try:
        with open(target, "x", encoding="utf-8") as file:
            file.write(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot write {target}: {error.strerror}") from error
    print(f"wrote {target}; what it extends is found from there too")
    return 0


def describe(path: Path) -> str:
    """The first sentence of a config's opening comment, which ends at the indented commands."""
    words = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("# ") or line.startswith("#   "):
            break
        words += line[2:].split()
    return re.split(r"(?<!et al)\. ", " ".join(words))[0].rstrip(".")


def shown(entries: dict) -> str:
    """The entries of a config as YAML, each with the place it was set, without secrets."""
    import yaml

    from align.config.secrets import masked

    lines: list[str] = []
    for key, entry in entries.items():
        text = yaml.safe_dump({key: masked(entry.value, key)}, sort_keys=False, allow_unicode=True)
        first, *rest = text.rstrip("\n").split("\n")
        lines += [f"{first:<56} # {entry.places}", *rest]
    return "\n".join(lines) + "\n"
