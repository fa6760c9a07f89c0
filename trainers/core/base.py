"""What every trainer shares: options that follow the machine, guards, phase times, checkpoints, tables and figures.

`RunOptions` and `TrainerMixin` sit in front of transformers' (or TRL's) configuration and trainer:
`class XConfig(RunOptions, TrainingArguments)`, `class XTrainer(TrainerMixin, Trainer)`. They are mix-ins so that a
trainer built on one of TRL's keeps TRL's defaults.
"""

import functools
import logging
import math
import shutil
import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import rotate_checkpoints

from align.distributed.checkpoints import damage, newest_whole, write_manifest
from align.errors import ConfigError, TrainingError

logger = logging.getLogger(__name__)

EXTRA_STATE = "align_state_{rank}.pt"


@functools.cache
def let_torch_load_to_numbered_cpus() -> None:
    """With several processes on CPUs, transformers loads the optimiser's state to the device "cpu:0", which
    `torch.load` does not know."""
    torch.serialization.register_package(
        0, lambda storage: None, lambda storage, location: storage if location.startswith("cpu:") else None
    )


def machine_has_cuda() -> bool:
    return torch.cuda.is_available()


@dataclass
class RunOptions:
    """Options of every method whose default follows the machine or differs from transformers'."""

    bf16: bool | None = field(
        default=None, metadata={"help": "bfloat16 mixed precision. Default: on a GPU that has it, off elsewhere."}
    )
    gradient_checkpointing: bool | None = field(
        default=None,
        metadata={"help": "Recompute activations in the backward pass. Default: on with a GPU, off on a CPU."},
    )
    logging_steps: float = field(default=10, metadata={"help": "Log every so many optimiser steps."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "transformers' hiding of non-finite losses; off here: they are errors."}
    )
    max_bad_share: float = field(
        default=0.0,
        metadata={
            "help": "Share of unusable rows (empty, malformed, too long) that is dropped with a warning; more is an "
            "error."
        },
    )

    def __post_init__(self):
        cuda = machine_has_cuda() and not self.use_cpu
        if self.bf16 is None:
            self.bf16 = cuda and not self.fp16 and torch.cuda.is_bf16_supported()
        if self.gradient_checkpointing is None:
            self.gradient_checkpointing = cuda
        if not cuda:
            self.dataloader_pin_memory = False
        if not 0 <= self.max_bad_share < 1:
            raise ConfigError(f"max_bad_share is a share in [0, 1), got {self.max_bad_share}")
        super().__post_init__()


@dataclass
class BaseConfig(RunOptions, TrainingArguments):
    """Configuration of the trainers that build on transformers' Trainer directly."""


class GradientsReachTheWeights(TrainerCallback):
    """Before the first update of a run: an error if no trainable weight got a gradient, a warning if some did not."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.looked = False

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.looked:
            return
        self.looked = True
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        without = [name for name, p in trainable.items() if p.grad is None]
        if without:
            found = (
                f"{len(without)} of {len(trainable)} trainable tensors got no gradient ({', '.join(without[:3])} ...)"
            )
            if len(without) == len(trainable):
                raise TrainingError(
                    f"{found}: nothing would be trained. Something on the way from the loss to the weights has no "
                    "backward pass (a quantised layer in its inference form, a detached output)"
                )
            logger.warning("%s. Unused experts or layers may do without; others would not be trained", found)


class TrainerMixin:
    """Guards and bookkeeping in front of a transformers-style trainer."""

    def __init__(self, *args, **kwargs):
        self._phase_seconds: dict[str, float] = defaultdict(float)
        self._seconds_within = 0.0  # of the phases that ended within the one that is open
        self._recorded: dict[str, list[float]] = {}
        self.resume_state: dict | None = None
        self.resume_step: int | None = None
        self.resume_folder: Path | None = None
        super().__init__(*args, **kwargs)
        if not self.is_deepspeed_enabled:  # which keeps gradients where they cannot be seen
            self.add_callback(GradientsReachTheWeights())
        if self.args.data_seed is None:
            # Left alone, accelerate shuffles by the seed that torch was given last, by whomever, and a resumed run
            # might see other batches.
            self.accelerator.dataloader_config.data_seed = self.args.seed

    # ---- time and metrics -------------------------------------------------------------------------------------------

    @contextmanager
    def phase(self, name: str):
        """Add the time spent inside to `time/<name>` of the next log. A phase within it is counted there only."""
        start, within_outer = time.perf_counter(), self._seconds_within
        self._seconds_within = 0.0
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self._phase_seconds[name] += seconds - self._seconds_within
            self._seconds_within = within_outer + seconds

    def record(self, name: str, value: float, weight: float = 1.0) -> None:
        """Add to a metric: the next log shows its weighted mean over the steps and ranks since the last one."""
        entry = self._recorded.setdefault(name, [0.0, 0.0])
        entry[0] += float(value) * float(weight)
        entry[1] += float(weight)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        is_eval = any(key.startswith("eval_") for key in logs)
        if not is_eval:
            gathered = gather_object([self._recorded])
            totals: dict[str, list[float]] = {}
            for rank in gathered:
                for name, (total, weight) in rank.items():
                    entry = totals.setdefault(name, [0.0, 0.0])
                    entry[0] += total
                    entry[1] += weight
            logs.update({name: total / weight for name, (total, weight) in totals.items() if weight})
            logs.update({f"time/{name}": seconds for name, seconds in self._phase_seconds.items()})
            self._recorded.clear()
            self._phase_seconds.clear()
            if self.args.fp16 and not math.isfinite(logs.get("grad_norm", 0.0)):
                del logs["grad_norm"]  # the loss scaler skipped this step and lowers its scale: that is how it works
        self._check_finite(logs)
        super().log(logs, start_time)
        self._check_finite(self.state.log_history[-1])  # with what TRL has added

    def _check_finite(self, logs: dict) -> None:
        bad = {name: value for name, value in logs.items() if isinstance(value, float) and not math.isfinite(value)}
        if bad:
            raise TrainingError(
                f"non-finite metrics at step {self.state.global_step}: {bad}. Lower the learning rate, or look at the "
                f"rows of this step; nothing was saved after the last checkpoint in {self.args.output_dir}."
            )

    # ---- guards -----------------------------------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        return self.state.global_step >= self.state.max_steps

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        if self.finished:  # transformers resumes a finished run with one more step if it ended within an epoch
            return [], None
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches and count is not None and int(torch.as_tensor(count).sum()) == 0:
            raise TrainingError(
                f"step {self.state.global_step + 1} would train no token: every label of its {len(batches)} batches "
                "is masked out. Look at the loss mask with --dry-run."
            )
        return batches, count

    def training_step(self, *args, **kwargs):
        with self.phase("train"):
            loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss of step {self.state.global_step + 1} is {loss.item()}. Lower the learning rate, or look at "
                "the rows of this step with --dry-run."
            )
        return loss

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def extra_state(self) -> dict:
        """What a method keeps beyond model, optimiser, scheduler and random states: tensors and plain values. A resumed
        run finds it in `resume_state`."""
        return {}

    def save_further_files(self, folder: Path) -> None:
        """Write what else belongs into a checkpoint, e.g. a second model; `resume_folder` has it. Called on all
        processes, as sharded weights need; the main process alone writes."""

    def _save_checkpoint(self, model, trial):
        self._check_weights()
        run_dir = self._get_output_dir(trial=trial)
        folder = Path(run_dir) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save and folder.exists():  # a damaged one, or one of an earlier run: nothing of it may stay
            shutil.rmtree(folder)
        self.accelerator.wait_for_everyone()
        # Older checkpoints are deleted only once the new one is declared whole.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        state = {
            "model_only": self.args.save_only_model,
            "processes": self.args.world_size,
            "method": self.extra_state(),
        }
        torch.save(state, folder / EXTRA_STATE.format(rank=self.args.process_index))
        self.save_further_files(folder)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_manifest(folder)
            rotate_checkpoints(
                run_dir, save_total_limit=limit, best_model_checkpoint=self.state.best_model_checkpoint, use_mtime=True
            )
        self.accelerator.wait_for_everyone()

    def _check_weights(self) -> None:
        """Refuse to save weights that no run could go on from (the newest checkpoint is the one that is resumed)."""
        local = [p.to_local() if isinstance(p, DTensor) else p for p in self.model.parameters() if p.requires_grad]
        if not all(p.detach().isfinite().all() for p in local):
            raise TrainingError(
                f"the weights are not finite after step {self.state.global_step}: no checkpoint is written. Lower the "
                "learning rate, and resume from the last checkpoint"
            )

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """As transformers' `train`; `resume_from_checkpoint=True` takes the newest undamaged checkpoint."""
        checkpoint = self._checkpoint(resume_from_checkpoint)
        self.resume_state = self.resume_step = self.resume_folder = None
        if checkpoint is not None:
            self._read_checkpoint(checkpoint)
        eval_on_start = self.args.eval_on_start
        # The evaluation at a checkpoint's step was made before the checkpoint was, if one was due.
        self.args.eval_on_start = eval_on_start and checkpoint is None
        try:
            output = super().train(resume_from_checkpoint=checkpoint, **kwargs)
        finally:
            self.args.eval_on_start = eval_on_start
        if self.state.global_step == (self.resume_step or 0):
            if checkpoint is None or not self.finished:
                raise TrainingError(
                    f"no step was trained after step {self.state.global_step} of {self.state.max_steps}: "
                    f"{len(self.train_dataset)} training rows do not reach one more batch"
                )
            logger.warning("%s is finished already: no step was left to train", checkpoint)
        return output

    def _checkpoint(self, wanted: str | bool | None) -> str | None:
        """The folder to resume from, checked; None to start from the beginning."""
        output_dir = self.args.output_dir
        if not wanted:
            old = sorted(path.name for path in Path(output_dir).glob("checkpoint-*"))
            if old and self.is_world_process_zero():
                logger.warning(
                    "training starts from the beginning, and %s holds %s of an earlier run: resuming later could take "
                    "them for this run's. Delete them, or use another output_dir",
                    output_dir,
                    ", ".join(old),
                )
            return None
        if wanted is True:
            newest = newest_whole(output_dir)
            if newest is None:
                raise TrainingError(f"nothing to resume: {output_dir} holds no undamaged checkpoint-<step>")
            return str(newest)
        problem = damage(wanted)
        if problem:
            raise TrainingError(f"cannot resume from {wanted}: {problem}")
        return str(wanted)

    def _read_checkpoint(self, checkpoint: str) -> None:
        path = Path(checkpoint) / EXTRA_STATE.format(rank=self.args.process_index)
        if not path.exists():
            raise TrainingError(
                f"{checkpoint} was written by fewer than {self.args.process_index + 1} processes ({path.name} is "
                "missing): resume with the number of processes that wrote it"
            )
        state = torch.load(path, weights_only=True)
        if state["model_only"]:
            raise TrainingError(
                f"{checkpoint} was written with save_only_model: it has no optimiser state to resume with. It can be "
                "the model of a new run"
            )
        if state["processes"] != self.args.world_size:
            logger.warning(
                "%s was written by %d processes, and %d go on from it: the run is the same, up to rounding, only if a "
                "step's batch is, and without dropout",
                checkpoint,
                state["processes"],
                self.args.world_size,
            )
        self.resume_state, self.resume_folder = state["method"], Path(checkpoint)
        let_torch_load_to_numbered_cpus()
        self.resume_step = TrainerState.load_from_json(Path(checkpoint) / "trainer_state.json").global_step

    # ---- tables and figures -----------------------------------------------------------------------------------------

    def log_table(self, name: str, columns: list[str], rows: list[list]) -> None:
        """Send a table to wandb, if it reports there. Main process only."""
        if "wandb" in self.args.report_to and self.is_world_process_zero():
            import wandb

            table = wandb.Table(columns=columns, data=rows)
            wandb.log({name: table, "train/global_step": self.state.global_step})

    def log_figure(self, name: str, figure) -> None:
        """Send a matplotlib figure to wandb and TensorBoard, whichever is reported to. Main process only."""
        if not self.is_world_process_zero():
            return
        import matplotlib.pyplot  # noqa: F401  (wandb and TensorBoard take for granted that somebody has)

        if "wandb" in self.args.report_to:
            import wandb

            wandb.log({name: wandb.Image(figure), "train/global_step": self.state.global_step})
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                callback.tb_writer.add_figure(name, figure, self.state.global_step)


def finish_tracking(args: TrainingArguments) -> None:
    """End this run in wandb, for a process that trains several models: the next one starts again at step 0, which an
    open run would drop."""
    if "wandb" in args.report_to and args.process_index == 0:
        import wandb

        wandb.finish()
