"""`align generate`: a file of prompts to a file of answers, scored if rewards are named."""

import argparse
from collections.abc import Collection

from align.cli.option_types import add_seed, add_template_kwargs, at_least

HELP = "answers to a file of prompts, by a run or a model; resumable, and scored by rewards"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="RUN_OR_MODEL", help="a run's folder (an adapter's too), or a hub name")
    add = parser.add_argument
    add("--prompts", required=True, metavar="DATA", help=".txt (one a line), .jsonl, .parquet ..., or a hub name")
    add("--to", required=True, metavar="FILE", help="the answers, .jsonl; a file that is there is resumed")
    add("--rewards", nargs="+", default=[], metavar="REWARD", help="a folder, file.py:function, '{type: ...}'")
    add("--revisions", type=int, default=0, metavar="N", help="show the model its answer and ask for a better one [0]")
    add("--revision_template", metavar="TEXT", help="how that is asked for [as in training: docs/methods/srpo.md]")
    add_drawing(parser)


def add_drawing(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--split", default="train", help="of the prompts [train]")
    add("--num_prompts", type=at_least(1), metavar="N", help="the first so many [all]")
    add(
        "--chat",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="plain text is a user's message [yes if the model has a chat template]",
    )
    add("--system", metavar="TEXT", help="a system message before every conversation that has none")
    add_template_kwargs(parser)
    add("--n", type=at_least(1), default=1, metavar="N", help="answers to every prompt [1]")
    add("--temperature", type=float, default=1.0, metavar="T", help="0 is greedy [1.0]")
    add("--top_p", type=float, default=1.0, metavar="P", help="[1.0]")
    add("--top_k", type=int, default=0, metavar="K", help="0: all tokens [0]")
    add("--max_prompt_length", type=int, default=1024, metavar="N", help="longer prompts are bad rows [1024]")
    add("--max_completion_length", type=int, default=512, metavar="N", help="[512]")
    add("--max_bad_share", type=float, default=0.0, metavar="X", help="share of prompts that may be left out [0]")
    add("--backend", default="auto", metavar="NAME", help="vllm, transformers or file.py:Class [auto]")
    add("--dtype", metavar="DTYPE", help="of the weights [as saved on a GPU, float32 on a CPU]")
    add_seed(parser)


def run(args: argparse.Namespace) -> int:
    from align.errors import ConfigError
    from align.evaluation.answers import score_answers
    from align.evaluation.scoring import build_rewards
    from align.modeling.load import load_tokenizer
    from align.rollout.make import check_backend

    check_backend(args.backend)
    if args.revisions < 0 or (args.revision_template is not None and not args.revisions):
        raise ConfigError("--revisions counts from 0, and --revision_template needs one or more")
    tokenizer = load_tokenizer(args.model)
    rewards = build_rewards(args.rewards, None, gold_name="", tokenizer=tokenizer)  # mistakes in them come first
    draw(args, args.model, args.to, rewards)
    print(f"wrote {args.to}")
    if rewards:
        for name, scores in score_answers(args.to, rewards).items():
            print(f"{name}: mean {sum(scores) / len(scores):.4g} over {len(scores)} answers")
    return 0


def draw(args: argparse.Namespace, model: str, output, rewards: Collection[str]) -> None:
    """The answers of one model, as the options of `add_drawing` say. rewards: names of those that will score them."""
    from align.errors import ConfigError
    from align.evaluation.answers import Drawing, check_reward_names, generate_answers
    from align.evaluation.prompt_file import as_chat, read_prompts
    from align.modeling.load import load_tokenizer

    rows = read_prompts(args.prompts, args.split)
    check_reward_names(rewards, set(rows.column_names) - {"chosen", "rejected"})  # of which no answer has any
    if args.num_prompts is not None:
        rows = rows.select(range(min(args.num_prompts, len(rows))))
    has_template = bool(load_tokenizer(model).chat_template)
    chat = has_template if args.chat is None else args.chat
    if args.system and not chat:
        raise ConfigError("--system needs a chat: " + ("drop --no-chat" if has_template else "no template is there"))
    if chat:
        rows = as_chat(rows, system=args.system, source=args.prompts)
    names = ("n", "temperature", "top_p", "top_k", "max_prompt_length", "max_completion_length", "seed", "backend")
    revising = {name: vars(args)[name] for name in ("revisions", "revision_template") if name in vars(args)}
    numbers = {name: getattr(args, name) for name in names}
    drawing = Drawing(**numbers, **revising, chat_template_kwargs=args.chat_template_kwargs)
    generate_answers(
        model, rows, output, drawing, source=args.prompts, dtype=args.dtype, max_bad_share=args.max_bad_share
    )
