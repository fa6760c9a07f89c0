"""`align reward-eval`: what a reward is worth, before anything is optimised against it."""

import argparse

from align.cli.option_types import add_seed, at_least

HELP = "evaluate rewards: accuracy, RewardBench, rewrites, length bias, calibration, agreement, best-of-n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "rewards",
        nargs="+",
        metavar="REWARD",
        help="a reward model's folder or hub name, file.py:function, '{type: ensemble, ...}', or run.yaml: its rewards",
    )
    add = parser.add_argument_group("preference pairs").add_argument
    add(
        "--data",
        metavar="DATA",
        help="pairs, in any of TRL's formats or RewardBench's (1, 2): a file, folder or hub name",
    )
    add("--split", default="train", help="its split [train]")
    add("--data_config", metavar="NAME", help="the configuration of a hub dataset")
    add(
        "--chat",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="make plain texts into a user's and an assistant's message [for RewardBench's subsets]",
    )
    add("--max_pairs", type=at_least(1), metavar="N", help="a random sample of so many pairs [all]")
    add("--max_bad_share", type=float, default=0.0, metavar="X", help="share of the rows that may be left out [0]")

    add = parser.add_argument_group("rewrites that keep the meaning").add_argument
    add("--rewrites", nargs="+", default=["all"], metavar="NAME", help="their names, or all, or none [all]")
    add("--rewrite_pairs", type=at_least(1), default=500, metavar="N", help="a random sample of so many pairs [500]")

    add = parser.add_argument_group("best-of-n against gold").add_argument
    add("--completions", metavar="TABLE", help="several completions per prompt, with a gold score")
    add("--gold", default="gold", metavar="COLUMN", help="the gold score [gold]")
    add("--prompt_column", metavar="COLUMN", help="rows of one prompt share it [prompt_id, else prompt]")
    add("--completion_column", default="completion", metavar="COLUMN", help="the text [completion]")
    add("--min_answers", type=at_least(1), metavar="N", help="leave out prompts with fewer completions")

    group = parser.add_argument_group("output")
    add = group.add_argument
    add("--output_dir", default="outputs/reward_eval", metavar="DIR", help="[%(default)s]")
    add("--title", default="Evaluation of reward models", help="title of the page")
    add_seed(group, "of samples, rewrites and the bootstrap")


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from align.evaluation.reward_eval import evaluate_reward
    from align.evaluation.reward_page import JSON_NAME, PAGE_NAME, print_reward_eval
    from align.evaluation.scoring import reward_specs

    result = evaluate_reward(
        [spec for word in args.rewards for spec in reward_specs(word)],
        args.data,
        split=args.split,
        config=args.data_config,
        chat=args.chat,
        max_pairs=args.max_pairs,
        max_bad_share=args.max_bad_share,
        rewrites=args.rewrites,
        rewrite_pairs=args.rewrite_pairs,
        completions=args.completions,
        gold=args.gold,
        prompt_column=args.prompt_column,
        completion_column=args.completion_column,
        min_answers=args.min_answers,
        output_dir=args.output_dir,
        title=args.title,
        seed=args.seed,
    )
    folder = Path(args.output_dir)
    print_reward_eval(result, [folder / PAGE_NAME, folder / JSON_NAME])
    return 0
