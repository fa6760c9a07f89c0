"""`align data show`: what is in a dataset. `align data convert`: "Human: ... Assistant: ..." text to chat messages."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from datasets import Dataset

AGAIN = "convert again"
HELP = "look at data before training (`show`), or make Human:/Assistant: text into chat messages (`convert`)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(title="actions", dest="action", metavar="ACTION", required=True)
    text = "faults, lengths, what limits cost, repeats, leakage, and the first rows with what is trained marked"
    add = actions.add_parser("show", help=text, description=text, allow_abbrev=False).add_argument
    add("data", metavar="DATA", help="a .parquet, .jsonl, .json or .csv file, a folder, or a hub name")
    add("--tokenizer", required=True, metavar="MODEL", help="folder or hub name of the model that is to be trained")
    add(
        "--use",
        choices=("pairs", "completions", "prompts", "unpaired"),
        help="what the rows are for [what their columns fit]",
    )
    add("--split", default="train", help="of the data [train]")
    add("--config", metavar="NAME", help="the configuration of a hub dataset")
    add("--against", metavar="DATA", help="other data that should share no row with it, such as the evaluation set")
    add("--against_split", metavar="SPLIT", help="its split, or another split of DATA")
    limits = [512, 1024, 2048, 4096]
    add("--limits", type=int, nargs="+", default=limits, metavar="N", help="of max_length [%(default)s]")
    text = "of more rows so many, drawn at random, are checked and tokenised; 0: all rows [20000]"
    add("--sample", type=int, default=20_000, metavar="N", help=text)
    add("--num_proc", type=int, metavar="N", help="processes that tokenise [one, with the tokenizer's threads]")
    add("--examples", type=int, default=2, metavar="N", help="rows shown [2]")
    add("--html", metavar="PAGE", help="write the report as a page too")

    text = "text to messages, and columns to the names that trainers read"
    add = actions.add_parser("convert", help=text, description=text, allow_abbrev=False).add_argument
    add("data", metavar="DATA", help="a .parquet, .jsonl, .json or .csv file, a folder, or a hub name")
    add("--to", required=True, metavar="FILE", help="a new .jsonl or .parquet file")
    add("--split", default="train", help="of the data [train]")
    add("--config", metavar="NAME", help="the configuration of a hub dataset")
    add("--plain", action="store_true", help="a prompt is a user's message, an answer the assistant's, as they are")
    add(
        "--rename",
        nargs="+",
        metavar="OLD=NEW",
        default=[],
        help="columns with other names: question=prompt, a+b=prompt",
    )
    text = "two columns of answers, which become chosen and rejected as --better or --scores says"
    add("--answers", nargs=2, metavar=("FIRST", "SECOND"), help=text)
    text = "the column that says which answer is better, and its values for the first and the second (<0, >0: signs)"
    add("--better", nargs=3, metavar=("COLUMN", "FIRST", "SECOND"), help=text)
    add("--scores", nargs=2, metavar=("FIRST", "SECOND"), help="columns of a score for each: the higher is better")
    add("--system_column", metavar="NAME", help="a column with the system message of each row")
    add("--system", metavar="TEXT", help="a system message put before every conversation")
    add("--max_bad_share", type=float, default=0.0, metavar="X", help="share of rows that may be left out [0]")


def run(args: argparse.Namespace) -> int:
    return show(args) if args.action == "show" else convert(args)


def show(args: argparse.Namespace) -> int:
    from align.data.rows import load_rows
    from align.errors import ConfigError
    from align.evaluation.data_report import data_report, lines, write_page
    from align.modeling.load import load_tokenizer

    for name, low in (("sample", 0), ("num_proc", 1)):
        if (vars(args)[name] or low) < low:
            raise ConfigError(f"--{name} must be at least {low}, not {vars(args)[name]}")
    other = None
    if args.against or args.against_split:
        config = None if args.against else args.config
        other = load_rows(args.against or args.data, args.against_split or "train", config)
    found = data_report(
        load_rows(args.data, args.split, args.config),
        load_tokenizer(args.tokenizer),
        use=args.use,
        limits=args.limits,
        against=other,
        examples=args.examples,
        sample=args.sample or None,
        num_proc=args.num_proc,
    )
    print("\n".join(lines(found)))
    if args.html:
        print(f"\npage: {write_page(args.html, found)}")
    return 0


def convert(args: argparse.Namespace) -> int:
    from pathlib import Path

    from align.data.arrange import chosen, joined
    from align.data.dialogue import convert_dialogues
    from align.data.formats import SCORED, TEXT_COLUMNS
    from align.data.rows import load_rows
    from align.errors import ConfigError

    target = Path(args.to)
    if target.exists():
        raise ConfigError(f"{target} is there already: name a new file, or delete it")
    if target.suffix not in (".jsonl", ".parquet"):
        raise ConfigError(f"--to {target}: the file's name must end in .jsonl or .parquet")
    if not 0 <= args.max_bad_share <= 1:
        raise ConfigError(f"--max_bad_share must be between 0 and 1, not {args.max_bad_share:g}")
    if bool(args.answers) != (bool(args.better) + bool(args.scores) == 1):
        raise ConfigError("--answers takes --better or --scores, which say which of the two is chosen")
    if args.system and args.system_column:
        raise ConfigError("--system and --system_column: one of them")
    names = {old: new for old, _, new in (word.partition("=") for word in args.rename)}
    texts = [old for old, new in names.items() if new in (*TEXT_COLUMNS, *SCORED)]
    rows = load_rows(args.data, args.split, args.config, texts=texts)
    rows = joined(rows, names)
    _check_names(names, rows.column_names)
    found = len(rows)
    if args.answers:
        rows = chosen(rows, args.answers, args.better or args.scores)
        if len(rows) < found:
            print(f"{found - len(rows)} of {found} rows have no better answer and are left out")
    if args.system_column and args.system_column not in rows.column_names:
        raise ConfigError(f"--system_column {args.system_column}: the columns are {', '.join(rows.column_names)}")
    options = {"plain": args.plain, "system": args.system, "system_column": args.system_column}
    options |= {"max_bad_share": args.max_bad_share, "changed": bool(names or args.answers)}
    converted, _ = convert_dialogues(rows.rename_columns(names), **options, source=args.data)
    _write(converted, target)
    print(f"wrote {len(converted)} of {found} rows to {target}")
    return 0


def _write(rows: "Dataset", target: "Path") -> None:
    """A whole file or none: what is there of one that broke off would be read as a smaller set."""
    from align.distributed.disk import writing

    with writing(target.parent, AGAIN):
        target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.unfinished")
    try:
        with writing(target, AGAIN):
            if target.suffix == ".jsonl":
                rows.to_json(unfinished, force_ascii=False)
            else:
                rows.to_parquet(unfinished)
            unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)


def _check_names(names: dict[str, str], columns: list[str]) -> None:
    from align.errors import ConfigError

    for old, new in names.items():
        if old not in columns or not new:
            raise ConfigError(f"--rename {old}={new}: write OLD=NEW; the columns are {', '.join(columns)}")
        if new in columns and new not in names or list(names.values()).count(new) > 1:
            raise ConfigError(f"--rename {old}={new}: there would be two columns {new}")
