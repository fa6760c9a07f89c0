"""What a run prints: one line per log, with the time, the step, what is left and the few numbers that a method is
judged by. All other numbers are in metrics.jsonl and in the trackers."""

import json
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from align.evaluation.metrics_file import MetricsWriter
from align.trainers.core.card import versions
from align.trainers.core.options import changed_settings

# Metric -> what it is called, in order; a line has those that its log has. The first five of an evaluation are its
# result, with the signs that a run went too far beside them.
SHOWN = {
    "loss": "loss", "reward": "reward", "kl": "kl", "entropy": "entropy", "completions/mean_length": "length",
    "rewards/margins": "margin", "rewards/accuracies": "accuracy", "margin": "margin", "accuracy": "accuracy",
    "mean_token_accuracy": "token acc", "grad_norm": "grad", "learning_rate": "lr",
}  # fmt: skip
SHOWN_OF_EVALUATIONS = {
    "loss": "loss", "proxy": "proxy", "gold": "gold", "kl": "kl", "entropy": "entropy", "length": "length",
    "rewards/margins": "margin", "rewards/accuracies": "accuracy", "margin": "margin", "accuracy": "accuracy",
    "mean_token_accuracy": "token acc",
}  # fmt: skip
EVALUATION = "eval_"


def duration(seconds: float) -> str:
    """0:04:12, or 2d 03:10 from a day on."""
    if seconds < 86400:
        return str(timedelta(seconds=round(seconds)))
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours // 24}d {hours % 24:02d}:{minutes:02d}"


def of_weighting(key: str) -> str | None:
    """What the line calls the value and the multiplier of a constraint, or a weight that changes in training; None of
    others."""
    part, _, name = key.partition("/")
    constraint, _, what = name.rpartition("/")
    if part == "constraints" and constraint and what in ("value", "multiplier"):
        return constraint if what == "value" else f"mult {constraint}"
    return f"weight {name}" if part == "dynamic_weights" and "/" not in name else None


def numbers(logs: dict[str, float]) -> list[tuple[str, str, float]]:
    """(kind, name, value) of what a line shows: kind is train, or eval with the name of one of several sets."""
    evaluated = [key.removeprefix(EVALUATION) for key in logs if key.startswith(EVALUATION)]
    if not evaluated:
        shown = (
            SHOWN.items() if "reward" not in logs else list(SHOWN.items())[1:]
        )  # a policy gradient's loss says little
        found = [("train", label, logs[key]) for key, label in shown if key in logs]
        return found + [("train", label, logs[key]) for key in logs if (label := of_weighting(key))]
    found = []
    for name in evaluated:
        key = max((k for k in SHOWN_OF_EVALUATIONS if name == k or name.endswith(f"_{k}")), key=len, default=None)
        of_set = name.removesuffix(key or "").rstrip("_")
        if key is not None and "/" not in of_set:
            found.append((f"eval {of_set}".rstrip(), SHOWN_OF_EVALUATIONS[key], logs[EVALUATION + name]))
    order = list(SHOWN_OF_EVALUATIONS.values())
    return sorted(found, key=lambda entry: order.index(entry[1]))


class Console(ProgressCallback):
    """transformers' progress bar on a terminal, with our lines above it; our lines alone elsewhere.

    bar: whether there may be one (`disable_tqdm` is False); only on a terminal is it shown.
    """

    def __init__(self, bar: bool):
        super().__init__()
        self.bar = bar and sys.stderr.isatty()
        self.begun, self.first_step = time.monotonic(), 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.begun, self.first_step = time.monotonic(), state.global_step
        if self.bar:
            super().on_train_begin(args, state, control, **kwargs)
            if self.training_bar is not None:  # a resumed run starts where it is
                self.training_bar.initial = self.training_bar.n = self.current_step = state.global_step

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar:
            super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if self.bar:
            super().on_prediction_step(args, state, control, eval_dataloader=eval_dataloader, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        if "train_runtime" in logs:
            tqdm.write(f"trained to step {state.global_step} in {duration(logs['train_runtime'])}")
            return
        shown = numbers(logs)
        for kind in dict.fromkeys(kind for kind, _, _ in shown):
            values = "  ".join(f"{name} {value:>10.4g}" for k, name, value in shown if k == kind)
            tqdm.write(f"{self.place(state)}  {kind:<5}  {values}")
        sys.stdout.flush()

    def place(self, state) -> str:
        """Time, step and what is left, at the pace since the run was started or resumed; as wide for every step."""
        done, width = state.global_step - self.first_step, len(str(state.max_steps))
        seconds = (time.monotonic() - self.begun) / done * (state.max_steps - state.global_step) if done > 0 else None
        left = "?" if seconds is None else duration(seconds)
        return f"{time.strftime('%H:%M:%S')}  step {state.global_step:>{width}}/{state.max_steps}  left {left:>8}"

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar:
            super().on_train_end(args, state, control, **kwargs)


class LogFile(TrainerCallback):
    """Writes all numbers to metrics.jsonl of the output folder (align.evaluation.metrics_file)."""

    def __init__(self, method: str, resume_step: Callable[[], int | None]):
        self.method, self.resume_step = method, resume_step
        self.writer: MetricsWriter | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            header = {
                "method": self.method,
                "started": datetime.now(UTC).isoformat(timespec="seconds"),
                "max_steps": state.max_steps,
                "processes": args.world_size,
                "versions": versions(),
                "settings": changed_settings(args),
            }
            self.writer = MetricsWriter(
                args.output_dir, json.loads(json.dumps(header, default=str)), self.resume_step()
            )

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.writer is not None and logs:
            shown = {key: value for key, value in logs.items() if isinstance(value, int | float)}
            self.writer.write({"step": state.global_step, "at": round(time.time(), 2), **shown})

    def on_train_end(self, args, state, control, **kwargs):
        self.writer = None  # later evaluations are not part of this run


def show_while_there_are_bars(callback: Any) -> None:
    """TRL's RichProgressCallback has bars from the begin of `train` to its end: predictions outside of it, such as
    those of a reward model's normaliser when it is trained, would end in its AttributeError."""
    if not hasattr(callback, "evaluation_bar"):
        return
    show = callback.on_prediction_step

    def on_prediction_step(*args: Any, **kwargs: Any) -> None:
        if callback.evaluation_bar is not None:
            show(*args, **kwargs)

    callback.on_prediction_step = on_prediction_step


def replace_printing(trainer: Any) -> None:
    """Our lines instead of transformers' dictionaries; a notebook keeps its table."""
    for one in trainer.callback_handler.callbacks:
        show_while_there_are_bars(one)
    for kind in (ProgressCallback, PrinterCallback):
        for own in [one for one in trainer.callback_handler.callbacks if type(one) is kind]:  # no user's subclass
            trainer.remove_callback(own)
            trainer.add_callback(Console(bar=kind is ProgressCallback))
            return
