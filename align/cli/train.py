"""`align sft`, `align reward`, `align remax` ...: resolve the config, train, save."""

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from align.config.arguments import resume_from
from align.config.secrets import Secret, expand
from align.errors import ConfigError
from align.methods import get_method

if TYPE_CHECKING:
    from align.config.resolve import RunConfig

logger = logging.getLogger(__name__)

SETTINGS_FILE = "align_config.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command itself; the keys of the config are read by `align.config.resolve`."""
    parser.add_argument("--config", metavar="FILE", help="a YAML file with any of the keys below")
    parser.add_argument("--dry-run", action="store_true", help="show what would be trained on, and how, then stop")
    parser.add_argument("--processes", type=int, metavar="N", help="with --dry-run: count for N processes")
    parser.add_argument(
        "--help", "-h", nargs="?", const="own", choices=("own", "all"), help="show this; `--help all`: every option"
    )


def run(args: argparse.Namespace, extra: list[str]) -> int:
    """Train the method `args.command`; `extra` holds the overrides of the command line."""
    if args.help:
        from align.config.help import format_help

        print(format_help(get_method(args.command), args.parser, args.help == "all"))
        return 0
    if args.processes is not None and not (args.dry_run and args.processes > 0):
        raise ConfigError("--processes N (from 1) goes with --dry-run; `align launch` starts several processes")
    from align.config.resolve import resolve

    config = resolve(args.command, args.config, extra, elsewhere=args.dry_run)
    if args.dry_run:
        from align.cli.dry_run import dry_run

        return dry_run(config, args.processes)
    train(config)
    return 0


def train(config: "RunConfig") -> None:
    """Train, and save the model and the resolved config in `output_dir`."""
    from align.cli import terminal
    from align.config.resolve import settings
    from align.distributed.disk import writing

    terminal.quieten_libraries()
    values = settings(config)
    with writing(config.training.output_dir):
        _train(config, values)


def _train(config: "RunConfig", values: dict) -> None:
    from align.cli import build
    from align.trainers.core.early import check_machine, check_wandb

    check_machine(config.training)  # before the model is loaded
    check_wandb(config.training)
    if config.training.hub_token is not None:
        config.training.hub_token = Secret(expand(config.training.hub_token, "hub_token"))
    output_dir = Path(config.training.output_dir)
    main_process = config.training.process_index == 0
    resume = config.training.resume_from_checkpoint
    keep_finished = resume is not None and resume.lower() in ("true", "auto")
    if config.ensemble is not None and config.ensemble.several:
        if resume is not None and resume.lower() not in ("true", "auto", "false"):
            raise ConfigError(f"an ensemble resumes with resume_from_checkpoint: auto, not from the folder {resume}")
        if main_process:
            save_settings(values, output_dir)
        build.train_ensemble(config, keep_finished)
        count, member = config.ensemble.ensemble, config.ensemble.ensemble_member
        what = f"the {count} members of the ensemble" if member is None else f"member {member} of {count}"
    elif build.is_sweep(config):
        if resume is not None and resume.lower() not in ("true", "auto", "false"):
            raise ConfigError(f"a sweep resumes with resume_from_checkpoint: auto, not from the folder {resume}")
        if main_process:
            save_settings(values, output_dir)
        build.train_sweep(config, keep_finished)
        what = "the points of the front"
    else:
        trainer = build.trainer(config)
        if main_process:
            save_settings(values, output_dir)
        trainer.train(resume_from_checkpoint=resume_from(resume))
        trainer.save_model(str(output_dir))
        what = "the model, its tokenizer"
    if main_process:
        print(f"saved {what} and {SETTINGS_FILE} in {output_dir}")


def save_settings(values: dict, output_dir: Path) -> None:
    """Write the resolved config beside the model."""
    from align.config.resolve import write_settings

    output_dir.mkdir(parents=True, exist_ok=True)
    write_settings(values, output_dir / SETTINGS_FILE)
