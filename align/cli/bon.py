"""`align bon`: best-of-n curves, from a table of scored completions or from a model and rewards."""

import argparse
import logging
import time

from align.errors import ConfigError

logger = logging.getLogger(__name__)

HELP = "best-of-n curves: a table of scored completions, or a model plus rewards"
INTRO = (
    "From n completions of the initial policy, the one with the highest proxy score is kept; a gold score judges the "
    "choice. The larger n, the harder the proxy is optimised. It is over-optimised from where the gold score of its "
    "choice falls."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("table", nargs="?", metavar="TABLE", help="scored completions: .parquet, .csv, .jsonl, .json")
    parser.add_argument("--proxy", action="append", metavar="COLUMN", help="a proxy score of the table (repeatable)")
    parser.add_argument("--gold", default="gold", metavar="COLUMN", help="the gold score of the table [gold]")
    parser.add_argument(
        "--prompt_column", metavar="COLUMN", help="rows of one prompt share it [prompt_id, else prompt]"
    )
    parser.add_argument("--completion_column", default="completion", metavar="COLUMN", help="[completion]")
    parser.add_argument(
        "--id_column", metavar="COLUMN", help="identifies an answer of a prompt [completion_id if there]"
    )
    parser.add_argument(
        "--ensemble",
        action="append",
        metavar="RULE",
        help="also choose by all proxies together: mean, wco or uwo:LAMBDA (repeatable; members are standardised)",
    )
    parser.add_argument("--n", type=int, metavar="N", help="the largest n [what every prompt has; with --model 64]")
    parser.add_argument("--min_answers", type=int, metavar="N", help="leave out prompts with fewer answers")
    parser.add_argument("--output_dir", default="outputs/bon", metavar="DIR", help="[%(default)s]")
    parser.add_argument("--title", default="Best-of-n", help="title of the report")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap, and of sampling with --model [0]")


def run(args: argparse.Namespace) -> int:
    from align.evaluation.best_of_n import bon_curve, n_grid
    from align.evaluation.console import print_summary
    from align.evaluation.report import write_outputs
    from align.evaluation.score_table import read_score_table
    from align.evaluation.summary import build_summary

    if args.table is None:
        raise ConfigError("give a table of scored completions")
    if not args.proxy:
        raise ConfigError("give the proxy score's column: --proxy COLUMN (repeat it for several)")
    if args.n is not None and args.n < 2:
        raise ConfigError(f"--n must be at least 2, got {args.n}")
    started = time.perf_counter()
    table = read_score_table(
        args.table,
        proxies=args.proxy,
        gold=args.gold,
        prompt=args.prompt_column,
        completion=args.completion_column,
        id_column=args.id_column,
    )
    read = time.perf_counter()
    selections = {name: table.scores[name] for name in args.proxy}
    for rule in args.ensemble or []:
        selections[rule] = ensemble_scores([table.scores[name] for name in args.proxy], rule)
    gold = table.by_prompt(args.gold)
    curves = {
        name: bon_curve(
            [scores[rows] for rows in table.rows],
            gold,
            ns=None if args.n is None else n_grid(args.n),
            min_answers=args.min_answers,
            name=name,
            gold_name=args.gold,
        )
        for name, scores in selections.items()
    }
    for note in dict.fromkeys(note for curve in curves.values() for note in curve.notes):
        logger.warning("%s: %s", args.table, note)
    setup = {
        "table": str(args.table),
        "rows": len(table.scores[args.gold]),
        "prompts": len(table.rows),
        "proxy scores": list(args.proxy),
        "ensembles": list(args.ensemble or []),
        "gold score": args.gold,
        "bootstrap seed": args.seed,
    }
    summary = build_summary(best_of_n=curves, setup=setup, seed=args.seed)
    summary["phases"] = {"read": read - started, "curves and fits": time.perf_counter() - read}
    paths = write_outputs(args.output_dir, summary, title=args.title, intro=INTRO)
    print_summary(summary, paths)
    return 0


def ensemble_scores(members: list, rule: str):
    """Scores of the ensemble of `members` (float [R] each), every member standardised over the table first."""
    import numpy as np
    import torch

    from align.objectives.ensemble import aggregate

    kind, _, weight = rule.partition(":")
    try:
        lambda_ = float(weight) if weight else None
    except ValueError as error:
        raise ConfigError(f"--ensemble {rule}: {weight!r} is not a number; the form is uwo:0.5") from error
    if len(members) < 2:
        raise ConfigError(f"--ensemble {rule} needs at least two --proxy columns")
    scores = np.stack(members)
    spread = scores.std(axis=1, keepdims=True)
    if not spread.all():
        raise ConfigError(f"--ensemble {rule}: proxy number {int(np.argmin(spread)) + 1} has one score for all answers")
    standardised = (scores - scores.mean(axis=1, keepdims=True)) / spread
    return aggregate(torch.from_numpy(standardised), kind, lambda_=lambda_).scores.numpy()
