"""Tables and figures for wandb and TensorBoard, on the main process, whichever of them a run reports to."""

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


def finish_tracking(args: TrainingArguments) -> None:
    """End this run in wandb, for a process that trains several models: the next one starts again at step 0, which an
    open run would drop."""
    if "wandb" in args.report_to and args.process_index == 0:
        import wandb

        wandb.finish()
