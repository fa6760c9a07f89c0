"""`align data convert`: "Human: ... Assistant: ..." text becomes chat messages."""

import argparse

HELP = "convert data: `align data convert FILE --to FILE` makes Human:/Assistant: text into chat messages"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("convert",), help="text of dialogues to messages")
    parser.add_argument("data", metavar="DATA", help="a .parquet, .jsonl, .json or .csv file, a folder, or a hub name")
    add = parser.add_argument
    add("--to", required=True, metavar="FILE", help="a new .jsonl or .parquet file")
    add("--split", default="train", help="of the data [train]")
    add("--system", metavar="TEXT", help="a system message put before every conversation")
    add("--max_bad_share", type=float, default=0.0, metavar="X", help="share of rows that may be left out [0]")


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from align.data.dialogue import convert_dialogues
    from align.data.rows import load_rows
    from align.errors import ConfigError

    target = Path(args.to)
    if target.exists():
        raise ConfigError(f"{target} is there already: name a new file, or delete it")
    if target.suffix not in (".jsonl", ".parquet"):
        raise ConfigError(f"--to {target}: the file's name must end in .jsonl or .parquet")
    rows = load_rows(args.data, args.split)
    converted, _ = convert_dialogues(rows, system=args.system, max_bad_share=args.max_bad_share, source=args.data)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.suffix == ".jsonl":
        converted.to_json(target, force_ascii=False)
    else:
        converted.to_parquet(target)
    print(f"wrote {len(converted)} of {len(rows)} rows to {target}")
    return 0
