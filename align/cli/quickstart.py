"""`align quickstart`: the whole way through the library on the embedded toy world."""

import argparse
import logging
import os
from dataclasses import replace

HELP = "the whole way on a toy world: SFT, reward ensemble, best-of-n, ReMax, report (minutes on a CPU)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output_dir", default=None, help="default: runs/quickstart-seed<seed>")
    parser.add_argument("--seed", type=int, default=0, help="of the world, the models and the sampling (default 0)")
    parser.add_argument("--small", action="store_true", help="a smaller version that only shows that everything runs")
    parser.add_argument(
        "--backend",
        choices=("auto", "vllm", "transformers"),
        default="auto",
        help="of the rollouts; auto (the default) is vLLM where it is installed",
    )


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    quieten()
    from align.quickstart.run import run_quickstart
    from align.quickstart.settings import FULL, SMALL

    name = f"runs/quickstart-seed{args.seed}{'-small' if args.small else ''}"
    settings = replace(SMALL if args.small else FULL, backend=args.backend)
    run_quickstart(args.output_dir or name, settings, args.seed, Console())
    return 0


def quieten() -> None:
    """One progress display instead of seven libraries' bars and notes. Before these libraries are imported."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in ("align", "trainers", "reward_models"):
        logging.getLogger(name).setLevel(logging.WARNING)
