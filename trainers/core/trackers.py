"""Tables and figures for wandb and TensorBoard, on the main process, whichever of them a run reports to."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import TrainingArguments
from transformers.integrations import TensorBoardCallback

from align.trainers.core.identity import WANDB_RUN, read_identity


def log_table(args: TrainingArguments, step: int, name: str, columns: list[str], rows: list[list]) -> None:
    """Send a table to wandb, if the run reports there."""
    if "wandb" in args.report_to and args.process_index == 0:
        import wandb

        table = wandb.Table(columns=columns, data=rows)
        wandb.log({name: table, "train/global_step": step})


def log_figure(args: TrainingArguments, callbacks: list, step: int, name: str, figure) -> None:
    """Send a matplotlib figure to wandb and TensorBoard. callbacks: the trainer's, of which TensorBoard's writes."""
    if args.process_index != 0:
        return
    import matplotlib.pyplot  # noqa: F401  (wandb and TensorBoard use it without importing it)

    if "wandb" in args.report_to:
        import wandb

        wandb.log({name: wandb.Image(figure), "train/global_step": step})
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            callback.tb_writer.add_figure(name, figure, step)


_opened: str | None = None
"""Of the run in wandb that a training of this process has opened last."""


def run_in_wandb(args: TrainingArguments) -> dict[str, str]:
    """What a checkpoint notes of it; empty where the run does not report there."""
    if "wandb" not in args.report_to or args.process_index != 0:
        return {}
    import wandb

    return {} if wandb.run is None else {WANDB_RUN: wandb.run.id}


@contextmanager
def own_run(args: TrainingArguments, *, first: bool, checkpoint: str | None) -> Iterator[None]:
    """A training's run in wandb. transformers leaves it open at the end, for what is logged afterwards, and the next
    trainer of the process would go on in it, from step 0 again: a run that an earlier training has opened ends here.
    One of `wandb.init` stays: it holds all that is trained until whoever opened it ends it. first: this trainer has not
    trained before; one that has goes on where it was. checkpoint: what is resumed from, whose run goes on."""
    if "wandb" not in args.report_to or args.process_index != 0:
        yield
        return
    import wandb

    global _opened
    if first and wandb.run is not None and wandb.run.id == _opened:
        wandb.finish()
    given = wandb.run
    if given is None and (noted := _noted(args, checkpoint)):  # transformers goes on in a run that is there
        project = os.environ.get("WANDB_PROJECT", "huggingface")  # as there
        wandb.init(project=project, name=args.run_name, id=noted, resume="allow")
    try:
        yield
    finally:
        if given is None and wandb.run is not None:
            _opened = wandb.run.id


def _noted(args: TrainingArguments, checkpoint: str | None) -> str | None:
    """The run in wandb that a checkpoint of this run's folder notes; None where the environment names one."""
    if checkpoint is None or "WANDB_RUN_ID" in os.environ:
        return None
    own = Path(checkpoint).resolve().parent == Path(args.output_dir).resolve()
    return (read_identity(checkpoint) or {}).get(WANDB_RUN) if own else None
