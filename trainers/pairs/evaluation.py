"""Evaluation on preference pairs: means over all pairs, and in the trackers a table of pairs and a histogram."""

from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor

from align.trainers.pairs.data import IDS

CHOSEN, REJECTED = "rewards/chosen", "rewards/rejected"


class PairEvaluation(ABC):
    """Of a trainer whose `data_collator` or `prediction_step` makes batches of pairs; it goes in front of TrainerMixin.

    `pair_values` says what is measured; pass `compute_metrics=self.pair_metrics` to transformers' Trainer.
    """

    eval_names: tuple[str, ...] = ()
    eval_values: dict[str, np.ndarray] | None = None
    """Of the last evaluation or prediction: a number per pair [N] by name."""
    reward_name = "reward"  # what a completion's number is called in the table and the figure

    @abstractmethod
    def pair_values(self, model, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Numbers of each pair of a batch [B] by name: `loss`, `rewards/chosen`, `rewards/rejected` and any others."""

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        batch = self._prepare_inputs(inputs)
        with torch.no_grad():
            values = self.pair_values(model, batch)
        self.eval_names = tuple(values)
        table = torch.stack([column.float() for column in values.values()], dim=-1)
        return None, table, table[:, 0]  # the means are taken in pair_metrics; nobody looks at the labels

    def pair_metrics(self, prediction) -> dict[str, float]:
        self.eval_values = dict(zip(self.eval_names, prediction.predictions.T, strict=True))
        return {name: float(values.mean()) for name, values in self.eval_values.items()}

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if {"wandb", "tensorboard"} & set(self.args.report_to) and eval_dataset is None:
            self._log_pairs(self.eval_values[CHOSEN], self.eval_values[REJECTED])
        return metrics

    def _log_pairs(self, chosen: np.ndarray, rejected: np.ndarray) -> None:
        import matplotlib.pyplot as plt

        step, name, decode = self.state.global_step, self.reward_name, self.processing_class.decode
        rows = self.eval_dataset.select(range(min(self.args.num_logged_pairs, len(self.eval_dataset))))
        columns = ["step", "prompt", "chosen", "rejected", f"{name} chosen", f"{name} rejected"]
        table = [
            [step, *(decode(row[ids]) for ids in IDS), float(a), float(b)]
            for row, a, b in zip(rows, chosen, rejected, strict=False)
        ]
        if table:
            self.log_table("completions", columns, table)
        figure, (both, margins) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
        both.hist([chosen, rejected], bins=30, label=["chosen", "rejected"])
        both.set(xlabel=name, ylabel="answers", title=f"step {step}")
        both.legend()
        margins.hist(chosen - rejected, bins=30)
        margins.axvline(0, color="black", linewidth=1)
        margins.set(xlabel=f"{name} of chosen - {name} of rejected", ylabel="pairs")
        self.log_figure(f"eval/{name}s", figure)
        plt.close(figure)
