"""`align compare`: which of two models answers better, by rewards and by judges, with the texts side by side."""

import argparse

from align.cli.generate import add_drawing
from align.cli.option_types import set_options

HELP = "win rate of A over B by rewards or judges, at equal length too, with the texts side by side on a page"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", help="a run, a model, or a file of align generate (.jsonl)")
    parser.add_argument("b", metavar="B", help="the same")
    add = parser.add_argument
    add("--prompts", metavar="DATA", help="needed unless A and B are files of answers")
    add("--rewards", nargs="+", default=[], metavar="REWARD", help="the higher score wins: as of align generate")
    add(
        "--judge",
        nargs="+",
        default=[],
        metavar="JUDGE",
        help="file.py:function(prompts, first, second), or {url: ..., model: ...}",
    )
    add("--output_dir", default="outputs/compare", metavar="DIR", help="[%(default)s]")
    add_drawing(parser)


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from align.cli.generate import draw
    from align.errors import ConfigError
    from align.evaluation import compare
    from align.evaluation.answers import read_answers, scores_of
    from align.evaluation.scoring import build_rewards
    from align.rollout.make import check_backend

    check_backend(args.backend)
    if not args.rewards and not args.judge:
        raise ConfigError("name who decides: --rewards REWARD..., --judge file.py:function, or both")
    drawn = [name for name in (args.a, args.b) if Path(name).suffix != ".jsonl"]
    given = set_options(args, add_drawing, but=("seed",)) + (["--prompts"] if args.prompts else [])
    if given and not drawn:
        raise ConfigError(
            f"{', '.join(given)} says how answers are drawn, and those of {args.a} and {args.b} are there"
        )
    rewards = build_rewards(args.rewards, None, gold_name="")
    judges = compare.build_judges(args.judge, rewards)
    folder, sides = Path(args.output_dir), []
    for side, source in (("a", args.a), ("b", args.b)):
        path = Path(source)
        if path.suffix != ".jsonl":
            if args.prompts is None:
                raise ConfigError(f"{source} is no file of answers: name --prompts for it")
            path = folder / f"answers_{side}.jsonl"
            draw(args, source, path, rewards)
        sides.append(read_answers(path))
    pairs = compare.paired(*sides)
    preferences: dict = {}
    scores = [scores_of([pair[side] for pair in pairs], rewards) for side in (0, 1)]
    for name in rewards:
        preferences[name] = compare.by_scores(pairs, scores[0][name], scores[1][name]), None
    for name, judge in judges.items():
        preferences[name] = compare.by_judge(pairs, judge, name)
    result = {"a": args.a, "b": args.b, "pairs": len(pairs), "prompts": len({one["row"] for one, _ in pairs}), "by": {}}
    for name, (preference, consistent) in preferences.items():
        found = compare.summarise(pairs, preference, seed=args.seed)
        result["longer"] = found.pop("longer")
        result["by"][name] = {**found, "consistent": consistent, "preference": preference.tolist()}
        rate, equal = (f"{x['value']:.1%} ({x['low']:.1%} to {x['high']:.1%})" for x in list(found.values())[:2])
        print(f"{name}: A wins {rate}, at equal length {equal}; {found['ties']:.1%} ties")
    page, _ = compare.write_comparison(folder, result, pairs)
    print(f"wrote {page} and compare.json")
    return 0
