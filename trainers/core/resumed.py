"""An optimiser that a run goes on with: its moments are of the checkpoint, its settings and schedule of the run."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.scheduler import AcceleratedScheduler
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from align.errors import ConfigError, TrainingError

RATE = ("lr",)
SETTINGS = ("initial_lr", "weight_decay", "betas", "eps")
"""What a configuration says of a group of parameters. Other entries may be state (schedule-free optimisers keep theirs
there)."""
OF_GROUPS = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
"""The same, as a configuration calls them."""
SAME_STATE = ("adamw_torch", "adamw_torch_fused")
PLATEAU = "reduce_lr_on_plateau"


@contextmanager
def own_settings(optimizer: Any, rate: bool = True) -> Iterator[None]:
    """Inside, a state is loaded; after it the settings of the optimiser are again what they were. Those in a state are
    of the run that wrote it, and would take the place of what `resume_changes` allows. rate: the learning rate too."""
    names = SETTINGS + RATE * rate
    own = [{name: group[name] for name in names if name in group} for group in optimizer.param_groups]
    yield
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)


def follow(scheduler: LRScheduler | AcceleratedScheduler) -> None:
    """Give the optimiser the rate that the run's schedule has at the step that was loaded. The loaded rate is of the
    other run's schedule, as are the rates that this one multiplies."""
    if isinstance(scheduler, AcceleratedScheduler):  # accelerate's, around that of DeepSpeed's engine
        scheduler = scheduler.scheduler
    if type(scheduler) is not LambdaLR:  # others have a state of their own, not a function of the step
        return
    groups = scheduler.optimizer.param_groups
    scheduler.base_lrs = [group["initial_lr"] for group in groups]
    factors = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    scheduler._last_lr = [base * factor(scheduler.last_epoch) for base, factor in factors]
    for group, rate in zip(groups, scheduler._last_lr, strict=True):
        group["lr"] = rate


def rewind(scheduler: LRScheduler) -> None:
    """Back to the first step of a schedule, which is a function of the step. ConfigError for another."""
    if type(scheduler) is not LambdaLR:
        raise ConfigError(
            f"a {type(scheduler).__name__} cannot begin again: leave the schedule to lr_scheduler_type, or use LambdaLR"
        )
    scheduler.last_epoch = 0
    follow(scheduler)


def check_optimizer_change(changed: dict[str, tuple[Any, Any]], what: str, deepspeed: bool) -> None:
    """TrainingError for changes that the state of an optimiser or a schedule cannot be taken over by.

    changed: {setting: (before, now)}; what: the checkpoint; deepspeed: it loads optimiser, settings and weights in one.
    """
    kept = [name for name in OF_GROUPS if name in changed and deepspeed]
    if kept:
        raise TrainingError(
            f"{kept[0]}: DeepSpeed loads the optimiser with its settings, and {what} would go on with "
            f"{changed[kept[0]][0]}. Begin a new run, in another output_dir, from its weights"
        )
    for name in ("optim", "optim_args", "optim_target_modules", "lr_scheduler_type"):
        before, now = changed.get(name, (None, None))
        fits = PLATEAU not in (before, now) if name == "lr_scheduler_type" else {str(before), str(now)} <= {*SAME_STATE}
        if name in changed and not fits:
            raise TrainingError(
                f"{name}: {what} holds a state of {before}, with which {now} cannot go on. Begin a new run, in another "
                "output_dir, from its weights"
            )
