"""`align bon`: best-of-n curves, from a table of scored completions, or from completions that are scored or drawn
first."""

import argparse
import logging
import time
from pathlib import Path
from typing import Any

from align.cli.option_types import add_seed, at_least, set_options
from align.errors import ConfigError

logger = logging.getLogger(__name__)

HELP = "best-of-n curves: a table of scored completions, or a model plus rewards"
INTRO = (
    "From n completions of the initial policy, the one with the highest proxy score is kept; a gold score judges the "
    "choice. The larger n, the harder the proxy is optimised. It is over-optimised from where the gold score of its "
    "choice falls."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("table", nargs="?", metavar="TABLE", help="completions: .parquet, .csv, .jsonl or .json")
    group = parser.add_argument_group("columns of the table")
    group.add_argument("--proxy", action="append", default=[], metavar="COLUMN", help="a proxy score (repeatable)")
    group.add_argument("--gold", default="gold", metavar="COLUMN", help="the gold score [gold]")
    _add_columns(group)

    add = parser.add_argument_group("scoring first").add_argument
    add(
        "--rewards",
        nargs="+",
        default=[],
        metavar="REWARD",
        help="score the completions with these: a classifier's folder, file.py:function, or '{type: ensemble, ...}'",
    )
    add("--gold_reward", metavar="REWARD", help="score the column --gold with this")
    add(
        "--chat",
        action="store_true",
        help="the table's texts are a user's and an assistant's message, for reward models that learned from messages",
    )

    group = parser.add_argument_group("drawing the completions first (instead of TABLE)")
    group.add_argument("--model", metavar="PATH", help="folder or hub name of the policy")
    _add_drawing(group)

    group = parser.add_argument_group("curves and report")
    add = group.add_argument
    add(
        "--ensemble",
        action="append",
        default=[],
        metavar="RULE",
        help="choose by all proxies together: mean, wco, uwo:LAMBDA, lcb:LAMBDA or quantile:SHARE (repeatable; "
        "members are standardised first)",
    )
    add(
        "--n",
        type=int,
        metavar="N",
        help="the largest n [what every prompt has]; with --model, draws per prompt [64]",
    )
    add("--min_answers", type=at_least(1), metavar="N", help="leave out prompts with fewer completions")
    add("--output_dir", default="outputs/bon", metavar="DIR", help="[%(default)s]")
    add("--title", default="Best-of-n", help="title of the report")
    add_seed(group, "of the bootstrap, and of drawing")


def _add_columns(group) -> None:
    add = group.add_argument
    add("--prompt_column", metavar="COLUMN", help="rows of one prompt share it [prompt_id, else prompt]")
    add("--completion_column", default="completion", metavar="COLUMN", help="the text [completion]")
    add("--id_column", metavar="COLUMN", help="identifies an answer of a prompt [completion_id if there]")


def _add_drawing(group) -> None:
    add = group.add_argument
    add("--prompts", metavar="DATA", help="a dataset with prompts: a file, a folder or a hub name")
    add("--split", default="train", help="its split [train]")
    add("--num_prompts", type=at_least(1), default=128, metavar="N", help="the first so many prompts [128]")
    add("--max_prompt_length", type=at_least(1), default=512, metavar="N", help="longer prompts are an error [512]")
    add("--max_completion_length", type=at_least(1), default=256, metavar="N", help="[256]")
    add("--temperature", type=float, default=1.0, metavar="T", help="[1.0]")
    add("--top_p", type=float, default=1.0, metavar="P", help="[1.0]")
    add("--backend", default="auto", metavar="NAME", help="vllm, transformers or file.py:Class [auto]")


def run(args: argparse.Namespace) -> int:
    from align.evaluation.best_of_n import bon_curve, joined_notes, n_grid
    from align.evaluation.console import print_summary
    from align.evaluation.report import write_outputs
    from align.evaluation.score_table import read_score_table
    from align.evaluation.summary import build_summary
    from align.rollout.make import check_backend

    _check(args)
    check_backend(args.backend)
    phases = {}
    started = time.perf_counter()
    path, proxies = args.table, list(args.proxy)
    if args.rewards:
        path, scored = _score(args)
        proxies += scored
        phases["draw and score" if args.model else "score"] = time.perf_counter() - started
    started = time.perf_counter()
    table = read_score_table(
        path,
        proxies=proxies,
        gold=args.gold,
        prompt=args.prompt_column,
        completion=args.completion_column,
        id_column=args.id_column,
    )
    phases["read"] = time.perf_counter() - started
    started = time.perf_counter()
    selections = {name: table.scores[name] for name in proxies}
    for rule in args.ensemble:
        if rule in selections:
            raise ConfigError(
                f"two curves would be named {rule!r}: --ensemble {rule} and a proxy, or the same rule twice"
            )
        selections[rule] = ensemble_scores([table.scores[name] for name in proxies], rule)
    gold = table.by_prompt(args.gold)
    curves = {
        name: bon_curve(
            [scores[rows] for rows in table.rows],
            gold,
            ns=None if args.n is None else [*n_grid(args.n), args.n],  # the grid alone may end below it
            min_answers=args.min_answers,
            name=name,
            gold_name=args.gold,
        )
        for name, scores in selections.items()
    }
    for note in joined_notes(curves):
        logger.warning("%s: %s", path, note)
    summary = build_summary(best_of_n=curves, setup=_setup(args, table, proxies), seed=args.seed)
    phases["curves and fits"] = time.perf_counter() - started
    summary["phases"] = phases
    paths = write_outputs(args.output_dir, summary, title=args.title, intro=INTRO)
    print_summary(summary, paths)
    return 0


def ensemble_scores(members: list, rule: str):
    """Scores of the ensemble of `members` (float [R] each), every member standardised over the table first."""
    import numpy as np
    import torch

    from align.evaluation.rounding import deviation
    from align.objectives.ensemble import aggregate

    kind, options = _read_rule(rule, len(members))
    scores = np.stack(members)
    spread = np.array([[deviation(member)] for member in members])
    if not spread.all():
        raise ConfigError(f"--ensemble {rule}: proxy number {int(np.argmin(spread)) + 1} has one score for all answers")
    standardised = (scores - scores.mean(axis=1, keepdims=True)) / spread
    return aggregate(torch.from_numpy(standardised), kind, **options).scores.numpy()


def _read_rule(rule: str, members: int) -> tuple[str, dict[str, Any]]:
    """The name of a `--ensemble` of so many proxies, and its parameter as `aggregate` takes it."""
    from align.objectives.ensemble import check_rule

    kind, _, number = rule.partition(":")
    try:
        value = float(number) if number else None
    except ValueError as error:
        raise ConfigError(f"--ensemble {rule}: {number!r} is not a number; the form is uwo:0.5") from error
    if members < 2:
        raise ConfigError(f"--ensemble {rule} needs at least two proxies")
    options = {"quantile" if kind == "quantile" else "lambda_": value}
    check_rule(kind, members, ddof=0, **{"lambda_": None, **options})
    return kind, options


def _check(args: argparse.Namespace) -> None:
    if (args.table is None) == (args.model is None):
        raise ConfigError("give either a table of completions, or --model and --prompts to draw them")
    if args.model is not None:
        lacking = [name for name in ("prompts", "rewards", "gold_reward") if not getattr(args, name)]
        if lacking:
            raise ConfigError(f"--model needs {', '.join('--' + name for name in lacking)} too")
        if args.proxy:
            raise ConfigError("--proxy names a column of a table; with --model, name --rewards")
    elif args.gold_reward and not args.rewards:
        raise ConfigError(
            "--gold_reward needs --rewards: with scores in the table, name the columns --proxy and --gold"
        )
    if args.chat and (args.model or not args.rewards):
        raise ConfigError("--chat says how --rewards read the texts of a table; there is no such table")
    twice = [name for name in args.proxy if args.proxy.count(name) > 1]
    if twice:
        raise ConfigError(f"--proxy {twice[0]} is given twice: an ensemble would count it twice")
    if not args.proxy and not args.rewards:
        raise ConfigError("give the proxy score's column: --proxy COLUMN, or --rewards to score the completions first")
    _check_ensembles(args)
    if args.n is not None and args.n < 2:
        raise ConfigError(f"--n must be at least 2, got {args.n}")
    if args.model is None and (given := set_options(args, _add_drawing)):
        raise ConfigError(f"{', '.join(given)} says how completions are drawn, and those of {args.table} are there")
    if args.model is not None and (given := set_options(args, _add_columns)):
        raise ConfigError(f"{', '.join(given)} names a column of a table; with --model, align names them itself")


def _check_ensembles(args: argparse.Namespace) -> None:
    """Before completions are drawn and scored, which may take hours."""
    if args.ensemble:
        from align.evaluation.scoring import reward_specs

        members = len(args.proxy) + sum(len(reward_specs(words)) for words in args.rewards)
        for rule in args.ensemble:
            _read_rule(rule, members)


def _score(args: argparse.Namespace) -> tuple[Path, list[str]]:
    """Score (and with --model draw) the completions; the scored table's path and its new proxy columns."""
    from align.evaluation.scoring import build_rewards, sample_table, score_table

    output = Path(args.output_dir) / "scores.parquet"
    names: list[str] = []

    def rewards_of(tokenizer=None) -> dict:
        rewards = build_rewards(args.rewards, args.gold_reward, gold_name=args.gold, tokenizer=tokenizer)
        names.extend(name for name in rewards if name != args.gold)
        return rewards

    if args.model is None:
        columns = {"prompt": args.prompt_column, "completion": args.completion_column}
        return score_table(args.table, rewards_of(), output, **columns, chat=args.chat), names
    args.n = args.n or 64
    path = sample_table(
        args.model,
        args.prompts,
        rewards_of,
        output,
        n=args.n,
        num_prompts=args.num_prompts,
        split=args.split,
        max_prompt_length=args.max_prompt_length,
        max_completion_length=args.max_completion_length,
        temperature=args.temperature,
        top_p=args.top_p,
        backend=args.backend,
        seed=args.seed,
    )
    return path, names


def _setup(args: argparse.Namespace, table, proxies: list[str]) -> dict:
    source = {"table": str(args.table)}
    if args.model is not None:
        keys = ("model", "prompts", "temperature", "top_p", "max_completion_length", "backend", "seed")
        source = {key: getattr(args, key) for key in keys}
    return {
        **source,
        "completions": len(table.scores[args.gold]),
        "distinct prompts": len(table.rows),
        "proxy scores": proxies,
        "ensembles": args.ensemble or "none",
        "gold score": args.gold_reward or args.gold,
    }
