"""Thresholds found within one run by Nelder-Mead (NM-PPO of Moskovitz et al. 2023, arXiv 2310.04373, section A.4).

One evaluation of the search is a stretch of training: set the thresholds, go on training until every constrained reward
is within a tolerance of its own on the evaluation set or the stretch is over, and take the gold score there. So the
evaluation set must be a validation set: the search selects on it, and only other prompts can tell how good its end is.
"""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from align.errors import ConfigError
from align.objectives.nelder_mead import NelderMead, random_simplex
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
    if options.steps < args.eval_steps:
        return (
            f"threshold_search.steps is {options.steps} and eval_steps {args.eval_steps:g}: a stretch of training ends "
            "at an evaluation"
        )
    if options.restore and args.eval_steps % args.steps_per_rollout:
        return (
            f"threshold_search.restore: eval_steps must be a multiple of the {args.steps_per_rollout} steps of a "
            "rollout, or the first policy would be trained on another's rollout"
        )
    return None


class ThresholdSearch(TrainerCallback):
    """Runs the search at the trainer's evaluations, and ends the run with it. Its state is a part of checkpoints."""

    def __init__(self, trainer, options: SearchSection):
        self.trainer, self.options = trainer, options
        spans = {name: options.reached[name] - low for name, low in options.start.items()}
        self.search = NelderMead(
            random_simplex(options.start, options.reached, np.random.default_rng(trainer.args.seed)),
            budget=options.budget,
            tolerance=options.convergence,
            cache_tolerance=None
            if options.cache is None
            else {name: options.cache * abs(span) for name, span in spans.items()},
        )
        self.point: dict[str, float] | None = None  # being trained for
        self.began = 0
        self.stretches: list[dict] = []
        self.first = self._snapshot() if options.restore else None

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if not self.trainer.is_in_train or "eval_gold" not in metrics:
            return  # an evaluation of the user's
        values = {name: metrics[f"eval_rewards/{name}"] for name in self.options.start}
        if self.point is not None:
            near = {n: abs(values[n] - t) <= self.options.tolerance * abs(t) for n, t in self.point.items()}
            steps = state.global_step - self.began
            if not all(near.values()) and steps < self.options.steps:
                return
            self._tell(values, metrics["eval_gold"], all(near.values()), steps)
        self._ask(state, control)

    def _tell(self, values: dict[str, float], gold: float, met: bool, steps: int) -> None:
        self.search.tell(self.point, gold)
        self.stretches.append({"thresholds": self.point, "values": values, "gold": gold, "met": met, "steps": steps})
        best, score = self.search.best
        if not self.trainer.is_world_process_zero():
            return
        logger.info(
            "threshold search, stretch %d of %d: %s %s after %d steps (%s), gold %.4g; best so far %.4g at %s",
            len(self.stretches), self.options.budget, _text(self.point), "met" if met else "not met", steps,
            _text(values), gold, score, _text(best),
        )  # fmt: skip
        content = {"best": {"thresholds": best, "gold": score}, "stretches": self.stretches}
        Path(self.trainer.args.output_dir).mkdir(parents=True, exist_ok=True)
        (Path(self.trainer.args.output_dir) / FILE_NAME).write_text(json.dumps(content, indent=2) + "\n")

    def _ask(self, state, control) -> None:
        self.point, self.began = self.search.ask(), state.global_step
        if self.point is None:
            self.trainer.weighting.set_thresholds(self.search.best[0])
            control.should_training_stop = True
            return
        self.trainer.weighting.set_thresholds(self.point)
        if self.options.restore and self.stretches:
            self._restore()

    # ---- back to the first policy -----------------------------------------------------------------------------------

    def _snapshot(self) -> dict[str, torch.Tensor]:
        kind = str(self.trainer.accelerator.distributed_type).rpartition(".")[2]
        if kind in ("FSDP", "DEEPSPEED"):
            raise ConfigError(f"threshold_search.restore works with DDP or in one process, not under {kind}")
        return {n: p.detach().cpu().clone() for n, p in self.trainer.model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def _restore(self) -> None:
        """The first policy with a fresh optimiser and fresh multipliers; the critic of PPO goes on."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        for name, parameter in model.named_parameters():
            if name in self.first:
                parameter.copy_(self.first[name])
        self.trainer.optimizer.state.clear()
        self.trainer.weighting.restart()
        self.trainer.engine.forget()  # it has the weights from before

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict:
        return {
            "search": self.search.state_dict(),
            "point": self.point,
            "began": self.began,
            "stretches": list(self.stretches),
        }

    def load_state_dict(self, state: dict) -> None:
        self.search.load_state_dict(state["search"])
        self.point, self.began, self.stretches = state["point"], state["began"], state["stretches"]
        self.trainer.weighting.set_thresholds(self.point or self.search.best[0])


def make_search(trainer) -> ThresholdSearch | None:
    """The search that the trainer's configuration asks for, added to its callbacks."""
    options = check_search(trainer.args)
    if options is None:
        return None
    if trainer.gold is None or trainer.eval_dataset is None:
        raise ConfigError(
            "threshold_search needs a gold_reward, which it maximises, and validation prompts as the evaluation set"
        )
    search = ThresholdSearch(trainer, options)
    trainer.add_callback(search)
    return search


def _text(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())
