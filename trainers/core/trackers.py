"""Tables and figures for wandb and TensorBoard, on the main process, whichever of them a run reports to."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import TrainingArguments
from transformers.integrations import TensorBoardCallback


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


@contextmanager
def own_run(args: TrainingArguments, *, first: bool) -> Iterator[None]:
    """A training's run in wandb. transformers leaves it open at the end, for what is logged afterwards, and the next
    trainer of the process would go on in it, from step 0 again: a run that an earlier training has opened ends here.
    One of `wandb.init` stays: it holds all that is trained until whoever opened it ends it. first: this trainer has not
    trained before; one that has goes on where it was."""
    if "wandb" not in args.report_to or args.process_index != 0:
        yield
        return
    import wandb

    global _opened
    if first and wandb.run is not None and wandb.run.id == _opened:
        wandb.finish()
    given = wandb.run
    try:
        yield
    finally:
        if given is None and wandb.run is not None:
            _opened = wandb.run.id
