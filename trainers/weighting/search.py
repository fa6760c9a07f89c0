"""Thresholds found within one run by Nelder-Mead (NM-PPO of Moskovitz et al. 2023, arXiv 2310.04373, section A.4).

One evaluation of the search is a stretch of training: set the thresholds, train until every constrained reward is
within a tolerance of its threshold on the evaluation set or the stretch is over, and take the gold score there. So the
evaluation set must be a validation set: the search selects on it, and only other prompts can tell how good its end is.
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback

from align.distributed.disk import write_whole
from align.errors import ConfigError
from align.objectives.nelder_mead import NelderMead, random_simplex
from align.trainers.core.resumed import PLATEAU, rewind
from align.trainers.weighting.base import Weighting
from align.trainers.weighting.sections import SearchSection

logger = logging.getLogger(__name__)

FILE_NAME = "threshold_search.json"


def check_search(args: Any) -> SearchSection | None:
    """The section `threshold_search` of an `OnPolicyConfig`, None without; ConfigError naming what does not fit it."""
    options = args.sections.get("threshold_search")
    if options is None:
        return None
    problem = _does_not_fit(args, options)
    if problem:
        raise ConfigError(problem, key="threshold_search")
    return options


def _does_not_fit(args: Any, options: SearchSection) -> str | None:
    held = args.sections.get("constraints", [])
    if not held or any(constraint.direction != "equal" for constraint in held):
        return "threshold_search moves the thresholds of constraints that are all `equal`"
    names = {constraint.reward for constraint in held}
    if set(options.start) != names or set(options.reached) != names:
        return f"threshold_search: start and reached must name {', '.join(sorted(names))}"
    if options.budget <= len(names):
        return f"threshold_search: budget must be at least {len(names) + 1}, got {options.budget}"
    if str(args.eval_strategy) not in ("steps", "IntervalStrategy.STEPS"):
        return "threshold_search looks at evaluations: set eval_strategy: steps and eval_steps"
    if args.eval_steps < 1:
        return (
            f"threshold_search counts steps, and eval_steps {args.eval_steps:g} is a share of the run: set a number of "
            "steps"
        )
    if options.steps < args.eval_steps:
        return (
            f"threshold_search.steps is {options.steps} and eval_steps {args.eval_steps:g}: a stretch of training ends "
            "at an evaluation"
        )
    return _cannot_restore(args, options) if options.restore else None


def _cannot_restore(args: Any, options: SearchSection) -> str | None:
    if args.eval_steps % args.steps_per_rollout:
        return (
            f"threshold_search.restore: eval_steps must be a multiple of the {args.steps_per_rollout} steps of a "
            "rollout, or the first policy would be trained on another's rollout"
        )
    warmup = vars(args).get("critic_warmup_steps", 0)
    if warmup >= options.steps:
        return (
            f"threshold_search.restore: every stretch starts with the {warmup} steps of critic_warmup_steps, and has "
            f"{options.steps}: the policy would not be trained"
        )
    kept = {
        "sync_ref_model": args.sync_ref_model,
        f"lr_scheduler_type: {PLATEAU}": args.lr_scheduler_type == PLATEAU,
        "a schedule_free optimiser": "schedule_free" in str(args.optim),
    }
    for what, found in kept.items():
        if found:
            return f"threshold_search.restore cannot put back what {what} has learned: leave one of them out"
    return None


class StartPolicy:
    """The trained weights of a policy as they are when this is made, and the state of what follows it, to go back to.

    Args:
        on_restore: called after the weights have changed: copies (in the rollout engine) are out of date.
        beside: further models that are trained (a critic), each with its optimiser.
        controllers: what else learns from the policy (its KL, its entropy), each with `state_dict` and
            `load_state_dict`.
    """

    def __init__(
        self,
        model: nn.Module,
        on_restore: Callable[[], None],
        *,
        beside: Sequence[tuple[nn.Module, torch.optim.Optimizer]] = (),
        controllers: Sequence[Any] = (),
    ):
        self.weights, self.beside = _trained(model), [(other, _trained(other), own) for other, own in beside]
        self.controllers = [(controller, controller.state_dict()) for controller in controllers]
        self.on_restore = on_restore

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any = None) -> None:
        """Back to the start, with fresh optimisers and at the first step of the schedule."""
        for trained, weights, own in ((model, self.weights, optimizer), *self.beside):
            _put_back(trained, weights)
            own.state.clear()
        for controller, state in self.controllers:
            controller.load_state_dict(state)
        if scheduler is not None:
            rewind(scheduler)
        self.on_restore()


def _trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().cpu().clone() for n, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def _put_back(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    for name, parameter in model.named_parameters():
        if name in weights:
            parameter.copy_(weights[name])


@dataclass
class Stretch:
    """A stretch of training: the thresholds it was trained for, the rewards and the gold score at its end, whether the
    rewards were within the tolerance there, and its optimiser steps."""

    thresholds: dict[str, float]
    values: dict[str, float]
    gold: float
    met: bool
    steps: int


class ThresholdSearch(TrainerCallback):
    """Runs the search at the evaluations of a training run, and ends the run with it.

    It looks at the metrics `eval_gold` and `eval_rewards/<name>` of evaluations between `on_train_begin` and
    `on_train_end`. Its state is a part of checkpoints.

    Args:
        weighting: whose thresholds are moved.
        seed: of the first simplex.
        folder: where threshold_search.json is written; None on a process that writes and logs nothing.
        start: with `restore`, what every stretch begins with.
    """

    def __init__(
        self,
        options: SearchSection,
        weighting: Weighting,
        *,
        seed: int,
        folder: Path | None,
        start: StartPolicy | None = None,
    ):
        self.options, self.weighting, self.folder, self.start = options, weighting, folder, start
        spans = {name: options.reached[name] - low for name, low in options.start.items()}
        self.search = NelderMead(
            random_simplex(options.start, options.reached, np.random.default_rng(seed)),
            budget=options.budget,
            tolerance=options.convergence,
            cache_tolerance=None
            if options.cache is None
            else {name: options.cache * abs(span) for name, span in spans.items()},
        )
        self.point: dict[str, float] | None = None  # being trained for
        self.began = 0
        self.stretches: list[Stretch] = []
        self.training = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.training = True

    def on_train_end(self, args, state, control, **kwargs):
        self.training = False
        if self.folder is None:
            return
        if self.point is not None:
            logger.warning(
                "threshold search: the run ended at step %d after %d stretches of the %d that it may have, before the "
                "search had. Resume it with a larger max_steps (a stretch has up to %d steps), or lower the budget",
                state.global_step, len(self.stretches), self.options.budget, self.options.steps,
            )  # fmt: skip
        if self.stretches and not self._met(self.search.best[0]):
            logger.warning(
                "threshold search: the rewards had not reached the best thresholds when gold was taken, so that "
                "its score is not theirs; give stretches more steps, or a wider tolerance (%s has the values)",
                self.folder / FILE_NAME,
            )

    @property
    def start_step(self) -> int:
        """The step at which the policy was the first one."""
        return 0 if self.start is None else self.began

    def on_evaluate(self, args, state, control, metrics, model=None, optimizer=None, lr_scheduler=None, **kwargs):
        if not self.training or "eval_gold" not in metrics:
            return  # called by the user, or without gold
        values = {name: metrics[f"eval_rewards/{name}"] for name in self.options.start}
        if self.point is not None:
            near = {n: abs(values[n] - t) <= self.options.tolerance * abs(t) for n, t in self.point.items()}
            steps = state.global_step - self.began
            if not all(near.values()) and steps < self.options.steps:
                return
            self._tell(Stretch(self.point, values, metrics["eval_gold"], all(near.values()), steps))
        self.point, self.began = self.search.ask(), state.global_step
        self.weighting.set_thresholds(self.search.best[0] if self.point is None else self.point)
        if self.point is None:
            control.should_training_stop = True
        elif self.start is not None and state.global_step:  # after steps of another stretch, or before the first
            self.start.restore(model, optimizer, lr_scheduler)
            self.weighting.restart()

    def _tell(self, stretch: Stretch) -> None:
        self.search.tell(stretch.thresholds, stretch.gold)
        self.stretches.append(stretch)
        if self.folder is None:
            return
        best, score = self.search.best
        met = self._met(best)
        logger.info(
            "threshold search, stretch %d of %d: %s %s after %d steps (%s), gold %.4g; best so far %.4g at %s%s",
            len(self.stretches), self.options.budget, _text(stretch.thresholds), "met" if stretch.met else "not met",
            stretch.steps, _text(stretch.values), stretch.gold, score, _text(best),
            "" if met else " (not met)",
        )  # fmt: skip
        content = {
            "best": {"thresholds": best, "gold": score, "met": met},
            "stretches": [asdict(s) for s in self.stretches],
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / FILE_NAME, [json.dumps(content, indent=2), "\n"])

    def _met(self, thresholds: dict[str, float]) -> bool:
        return any(stretch.met for stretch in self.stretches if stretch.thresholds == thresholds)

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict:
        return {
            "search": self.search.state_dict(),
            "point": self.point,
            "began": self.began,
            "stretches": [asdict(stretch) for stretch in self.stretches],
        }

    def load_state_dict(self, state: dict) -> None:
        self.search.load_state_dict(state["search"])
        self.point, self.began = state["point"], state["began"]
        self.stretches = [Stretch(**stretch) for stretch in state["stretches"]]
        self.weighting.set_thresholds(self.point or self.search.best[0])


def make_search(
    args: Any,
    weighting: Weighting,
    *,
    has_gold: bool,
    sharded: bool,
    start: Callable[[], StartPolicy],
) -> ThresholdSearch | None:
    """The search that a configuration (`OnPolicyConfig`) asks for, None without; ConfigError where it cannot be run.

    Args:
        has_gold: whether evaluations measure a gold score. sharded: whether no process holds whole weights.
        start: makes what `restore` goes back to.
    """
    options = check_search(args)
    if options is None:
        return None
    if not has_gold:
        raise ConfigError(
            "threshold_search needs a gold_reward, which it maximises, and validation prompts as the one evaluation set"
        )
    if options.restore and sharded:
        raise ConfigError("threshold_search.restore works with DDP or in one process, not under FSDP or DeepSpeed")
    return ThresholdSearch(
        options,
        weighting,
        seed=args.seed,
        folder=Path(args.output_dir) if args.process_index == 0 else None,
        start=start() if options.restore else None,
    )


def _text(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())
