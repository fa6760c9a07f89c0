"""`stop_at`: a run ends when its gold score has fallen from its peak, or when an ensemble's members disagree too much.

Decided at the evaluations by what they have measured so far, prompt by prompt, and by nothing else: a resumed run finds
that in its checkpoint, and decides as the one that was not interrupted.
"""

import logging
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import TrainerControl, TrainerState
from transformers.trainer_utils import SaveStrategy

from align.distributed.ranks import shared
from align.errors import ConfigError
from align.evaluation.bootstrap import mean_interval
from align.evaluation.peak import FALLEN, MIN_PROMPTS, analyse_peak
from align.reward_models.base import Reward
from align.reward_models.composite import CompositeReward
from align.reward_models.ensemble import RewardEnsemble
from align.trainers.weighting.sections import StopSection, parse_stop

logger = logging.getLogger(__name__)


def disagreement_columns(rewards: Sequence[Reward], prefix: str = "") -> dict[str, str]:
    """By the name of each ensemble of two members or more, also within composites: the key of a sample's extras that
    holds the variance of its members' scores."""
    found: dict[str, str] = {}
    for reward in rewards:
        name = f"{prefix}{reward.name}"
        if isinstance(reward, RewardEnsemble) and len(reward.members) > 1:
            found[name] = f"{name}/variance"
        elif isinstance(reward, CompositeReward):
            found |= disagreement_columns(reward.rewards, f"{name}/")
    return found


# ---- options ---------------------------------------------------------------------------------------------------------


def prepare_stop(args: Any) -> None:
    """Before transformers reads an `OnPolicyConfig`: the checkpoint to keep is that of the highest gold score."""
    if args.stop_at is None:
        return
    options = args.stop_at = parse_stop(args.stop_at, "stop_at")
    if options.gold_peak is not None and args.metric_for_best_model is None:
        args.metric_for_best_model = "eval_gold"


def check_stop(args: Any) -> None:
    """ConfigError naming what does not fit the section `stop_at` of an `OnPolicyConfig`."""
    options = args.sections.get("stop_at")
    problem = None if options is None else _does_not_fit(args, options)
    if problem:
        raise ConfigError(f"stop_at{problem}", key="stop_at")


def _does_not_fit(args: Any, options: StopSection) -> str | None:
    if args.eval_strategy == "no":
        return " looks at evaluations: set eval_strategy: steps and eval_steps"
    if args.threshold_search is not None:
        return " and threshold_search both decide when the run ends: set one of them"
    if options.gold_peak is None:
        return None
    if args.save_strategy == SaveStrategy.NO:
        return ".gold_peak keeps the checkpoint of the peak: set save_strategy to steps, epoch or best"
    if not re.fullmatch(r"(eval_)?(.+_)?gold", args.metric_for_best_model) or not args.greater_is_better:
        return (
            ".gold_peak keeps the checkpoint with the highest gold score, and metric_for_best_model is "
            f"{args.metric_for_best_model}: leave that and greater_is_better out"
        )
    if args.num_eval_prompts is not None and args.num_eval_prompts < MIN_PROMPTS:
        return _too_few(args.num_eval_prompts)
    return None


def _too_few(count: int) -> str:
    return f".gold_peak needs evaluations on at least {MIN_PROMPTS} prompts, not {count}: chance decides with fewer"


GOLD = ("gold", "eval_gold")


def name_best_metric(args: Any, eval_dataset: Any) -> None:
    """Of several evaluation sets the first decides; TRL's `eval_reward` is `eval_proxy` here."""
    if args.metric_for_best_model in ("reward", "eval_reward"):
        args.metric_for_best_model = "eval_proxy"
    if isinstance(eval_dataset, dict) and args.stop_at is not None and args.metric_for_best_model in GOLD:
        args.metric_for_best_model = f"eval_{next(iter(eval_dataset))}_gold"


def make_stop(args: Any, *, has_gold: bool, eval_dataset: Any, ensembles: Sequence[str]) -> "StopRule | None":
    """The rule that a configuration (`OnPolicyConfig`) asks for, None without; ConfigError where it cannot be decided.

    ensembles: names of those whose disagreement evaluations measure.
    """
    options = args.sections.get("stop_at")
    if options is None:
        return None
    first = next(iter(eval_dataset.values())) if isinstance(eval_dataset, dict) else eval_dataset
    problem = None
    if first is None:
        problem = " looks at evaluations: give prompts to evaluate on (eval_dataset)"
    elif options.gold_peak is not None and not has_gold:
        problem = ".gold_peak needs a gold_reward, whose peak it looks for"
    elif options.gold_peak is not None and (other := _of_another_set(args, eval_dataset)):
        problem = other
    elif options.gold_peak is not None and len(first) < MIN_PROMPTS:
        problem = _too_few(len(first))
    elif options.disagreement is not None and len(first) < 2:
        problem = ".disagreement needs evaluations on at least 2 prompts"
    elif options.disagreement is not None:
        problem = _ensemble_problem(options.disagreement.reward, ensembles)
    if problem:
        raise ConfigError(f"stop_at{problem}", key="stop_at")
    ensemble = None if options.disagreement is None else options.disagreement.reward or ensembles[0]
    return StopRule(options, ensemble, metric=args.metric_for_best_model, loads=args.load_best_model_at_end)


def _of_another_set(args: Any, eval_dataset: Any) -> str | None:
    """Where the peak would be that of one evaluation set, and the checkpoint that is kept the best on another."""
    names = list(eval_dataset) if isinstance(eval_dataset, dict) else []
    metric = args.metric_for_best_model.removeprefix("eval_")
    if not names or metric == f"{names[0]}_gold":
        return None
    return (
        f".gold_peak decides by the first evaluation set, {names[0]}, and metric_for_best_model is "
        f"{args.metric_for_best_model}: leave that out, or put its set first"
    )


def _ensemble_problem(wanted: str | None, ensembles: Sequence[str]) -> str | None:
    known = ", ".join(ensembles)
    if not ensembles:
        return ".disagreement needs a reward that is an ensemble of two members or more"
    if wanted is None and len(ensembles) > 1:
        return f".disagreement.reward must say which ensemble: {known}"
    if wanted is not None and wanted not in ensembles:
        return f".disagreement.reward is {wanted!r}, and the ensembles are: {known}"
    return None


# ---- the rule --------------------------------------------------------------------------------------------------------


class StopRule:
    """What the evaluations of a run have measured, [P] numbers each, and whether the run ends there.

    Args:
        ensemble: name of the one whose disagreement is looked at, None for none.
        metric: by which transformers chooses the checkpoint to keep (the gold score, or one that the user has named).
            None and the loss, its default for what needs one: the last checkpoint within the limit of the disagreement
            is kept.
        loads: whether the run ends with the weights of that checkpoint.
    """

    def __init__(self, options: StopSection, ensemble: str | None, *, metric: str | None, loads: bool):
        self.options, self.ensemble, self.metric, self.loads = options, ensemble, metric, loads
        self.keeps_last_within = options.gold_peak is None and metric in (None, "loss", "eval_loss")
        self.clear()

    def clear(self) -> None:
        """Forget the evaluations: another run begins."""
        self.steps: list[int] = []
        self.columns: dict[str, list[list[float]]] = {"proxy": [], "gold": [], "disagreement": []}
        self.reason: str | None = None  # why the run ends, None as long as it goes on

    def observe(self, rows: list[dict], state: TrainerState, control: TrainerControl) -> None:
        """After an evaluation, on all processes. rows: as `PolicyEvaluator.evaluate` returns them."""
        step = state.global_step
        if self.steps and step <= self.steps[-1]:
            return  # evaluated once more by somebody else
        self.steps.append(step)
        measured = {"disagreement": f"disagreement/{self.ensemble}"} if self.ensemble is not None else {}
        if self.options.gold_peak is not None:
            measured |= {"proxy": "proxy", "gold": "gold"}
        for column, name in measured.items():
            self.columns[column].append([float(row[name]) for row in rows])
        self._decide()
        if self.reason is not None and step == 0:
            raise ConfigError(f"stop_at would end the run before its first step: {self.reason}", key="stop_at")
        if self._is_best():
            control.should_save = True  # there would be no checkpoint of this peak
        if self.reason is not None:
            control.should_training_stop = True
            if state.is_world_process_zero:
                logger.warning("the run ends at step %d: %s. %s", step, self.reason, self._kept(state))

    def chosen(self, best: bool, before: int | None, state: TrainerState) -> bool:
        """Whether this evaluation's checkpoint is the one to keep, now that transformers has decided by its metric
        (best). before: `best_global_step` as it was."""
        if not self.keeps_last_within:
            return best
        within = state.global_step > 0 and not self._too_apart(len(self.steps))
        state.best_global_step = state.global_step if within else before
        return within

    def _is_best(self) -> bool:
        """Whether the last evaluation's gold score is the highest. The start has no checkpoint, so it does not count,
        for transformers neither."""
        after = [means for step, means in zip(self.steps, self.columns["gold"], strict=False) if step > 0]
        return bool(after) and int(np.array(after).mean(1).argmax()) == len(after) - 1 and self.steps[-1] > 0

    def _kept(self, state: TrainerState) -> str:
        best = state.best_model_checkpoint
        if self._is_best():
            best = f"checkpoint-{state.global_step}"  # which is written after this
        elif self.options.gold_peak is None and not self.keeps_last_within:
            best = f"the checkpoint of the best {self.metric}"
        if best is None:
            return "No checkpoint was written before"
        if self.loads:
            return f"It ends with the weights of {best} (load_best_model_at_end)"
        return f"Kept is {best}; the run ends with and saves the last policy, unless load_best_model_at_end is set"

    def _decide(self) -> None:
        """By the evaluations so far. The main process decides: processors round differently."""
        self.reason = shared(self._fell() or self._disagreed())

    def _fell(self) -> str | None:
        if self.options.gold_peak is None:
            return None
        patience, count = self.options.gold_peak.patience, len(self.steps)
        proxy, gold = np.array(self.columns["proxy"]), np.array(self.columns["gold"])
        found = None
        for end in range(count, count - patience, -1):  # each of the last ones, as it looked then
            found = analyse_peak(proxy[:end], gold[:end]) if end > 1 else None
            if found is None or found.verdict not in FALLEN:
                return None
        found = analyse_peak(proxy, gold)
        means, (low, high) = gold.mean(1), found.drop_interval or (0.0, 0.0)
        rose = "" if found.verdict != "never helped" else "; it had not risen above the start by more than chance"
        return (
            f"the gold score was {means[found.peak]:.4g} at its peak at step {self.steps[found.peak]} and is "
            f"{means[-1]:.4g} (95 % interval of the fall {low:.3g} to {high:.3g}), below it by more than chance in "
            f"{_evaluations(patience)}{rose}"
        )

    def _too_apart(self, end: int) -> bool:
        """Whether the evaluation before index `end` is above the limit by more than chance."""
        assert self.options.disagreement is not None
        values = np.array(self.columns["disagreement"][end - 1])[:, None]
        return bool(mean_interval(values)[0][0] > self.options.disagreement.limit)

    def _disagreed(self) -> str | None:
        options, count = self.options.disagreement, len(self.steps)
        if options is None or count < options.patience:
            return None
        if not all(self._too_apart(end) for end in range(count, count - options.patience, -1)):
            return None
        values = np.array(self.columns["disagreement"])
        return (
            f"the members of {self.ensemble} disagree by {values[-1].mean():.4g} (a standard deviation, mean over the "
            f"prompts), above the limit {options.limit:g} by more than chance in {_evaluations(options.patience)}"
        )

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict:
        return {"steps": list(self.steps), "columns": {name: list(rows) for name, rows in self.columns.items()}}

    def load_state_dict(self, state: dict | None) -> None:
        """None, or without what this rule looks at: of a run that had another, which is looked at from here on."""
        self.clear()
        if state is None:
            return
        count = len(state["steps"])
        needed = ["gold"] * (self.options.gold_peak is not None) + ["disagreement"] * (self.ensemble is not None)
        if any(len(state["columns"][name]) != count for name in needed):
            return
        self.steps, self.columns = list(state["steps"]), {name: list(rows) for name, rows in state["columns"].items()}
        if count:
            self._decide()


def _evaluations(count: int) -> str:
    return "this evaluation" if count == 1 else f"{count} evaluations in a row"
