"""`metric_for_best_model`, looked for before it is needed: transformers does so after the first evaluation.

An evaluation has what the method measures, and what a user's `compute_metrics`, callback or subclass adds to it.
Without these its metrics are known when training begins (on-policy methods, SFT) or at the first step (pairs).
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from align.config.names import nearest
from align.errors import ConfigError
from align.trainers.core.hooks import TrainerHooks

OF_EVERY_EVALUATION = ("loss", "runtime", "samples_per_second", "steps_per_second", "epoch")
LIBRARIES = ("align.", "transformers.", "trl.")
MEASURING = ("evaluate", "evaluation_loop", "prediction_step", "pair_metrics", "log")


class FindsBestMetric(TrainerHooks):
    """Of every trainer."""

    args: Any
    user_metrics: Any = None
    """A user's `compute_metrics`."""

    def evaluation_metrics(self) -> Collection[str] | None:
        """Names of what an evaluation measures, without `eval_`; None where that is known at a step at the earliest."""
        return None

    def check_best_metric(self, metrics: Collection[str] | None) -> None:
        """ConfigError where evaluations will not have the metric. metrics: as of `evaluation_metrics`."""
        args = self.args
        if args.metric_for_best_model is None or metrics is None or args.eval_strategy == "no" or self._measures_more():
            return
        metric = args.metric_for_best_model.removeprefix("eval_")
        prefix = self._set_of(metric)
        if metric.removeprefix(prefix) not in {*metrics, *OF_EVERY_EVALUATION}:
            raise _not_found(f"eval_{metric}", [f"eval_{prefix}{name}" for name in sorted({"loss", *metrics})])

    def _check_sets(self) -> None:
        """transformers' default for what needs a metric (load_best_model_at_end, save_strategy: best, a plateau's
        schedule) is `eval_loss`, which several sets do not have."""
        if self.args.metric_for_best_model is None or not isinstance(self.eval_dataset, dict):
            return
        metric = self.args.metric_for_best_model.removeprefix("eval_")
        if not self._set_of(metric):
            raise ConfigError(
                f"metric_for_best_model is {metric!r}, and the evaluation sets have metrics of their own: name one, "
                f"such as eval_{next(iter(self.eval_dataset))}_{metric}",
                key="metric_for_best_model",
            )

    def _set_of(self, metric: str) -> str:
        """`far_` of `far_loss` where there are several evaluation sets, one of them `far`; else nothing."""
        names = list(self.eval_dataset) if isinstance(self.eval_dataset, dict) else []
        named = max((name for name in names if metric.startswith(f"{name}_")), key=len, default=None)
        return "" if named is None else f"{named}_"

    def _measures_more(self) -> bool:
        """Whether something of the user's may add to the metrics of an evaluation."""
        if self.user_metrics is not None:
            return True
        callbacks = self.callback_handler.callbacks
        hooks = [getattr(type(self), name) for name in MEASURING if hasattr(type(self), name)]
        hooks += [getattr(type(one), name) for one in callbacks for name in ("on_evaluate", "on_log")]
        return not all(hook.__module__.startswith(LIBRARIES) for hook in hooks)

    def _report_to_hp_search(self, trial: Any, step: int, metrics: dict[str, float]) -> None:
        """Between an evaluation and the first who looks for the metric in it. What was trained is kept first."""
        metric = self.args.metric_for_best_model
        if metric is not None and (name := f"eval_{metric.removeprefix('eval_')}") not in metrics:
            kept = ""
            if self.state.global_step > 0 and self.args.save_strategy != "no":
                self._save_checkpoint(self.model_wrapped, trial)
                folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
                kept = f". What was trained is in {folder}, from which the run can be resumed"
            raise _not_found(name, sorted(metrics), kept)
        super()._report_to_hp_search(trial, step, metrics)


def _not_found(metric: str, there: list[str], kept: str = "") -> ConfigError:
    near = nearest(metric, there)
    return ConfigError(
        f"metric_for_best_model: evaluations have no {metric}{f'; nearest: {near}' if near else ''}. They have: "
        f"{', '.join(there)}{kept}",
        key="metric_for_best_model",
    )
